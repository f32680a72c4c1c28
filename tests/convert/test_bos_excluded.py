"""`bos_excluded`: written where it is known."""

from __future__ import annotations

import gguf
import pytest

from convert.sae_gguf import read_sae_gguf, write_sae_gguf

from .test_sae_gguf import random_sae
from .test_sae_gguf_refused import BOOL, STRING, rewrite


@pytest.mark.parametrize(("training", "written"), [
    ({"config": {"lr": 1e-3}, "step": 5}, True),  # flagged rows are left out of every training of ours
    ({"imported_from": "saelens", "config": {}}, None), ({}, None), ({"untrained": True}, None),
    ({"imported_from": "saelens", "bos_excluded": True}, True), ({"imported_from": "saelens", "bos_excluded": False}, False),
])  # fmt: skip
def test_bos_excluded_is_written_where_it_is_known_and_kept(tmp_path, training, written):
    path = write_sae_gguf(tmp_path / "sae.gguf", random_sae(training=training))
    for file in (path, write_sae_gguf(tmp_path / "again.gguf", read_sae_gguf(path))):
        field = gguf.GGUFReader(file).get_field("sae.0.bos_excluded")
        assert (field and field.contents()) == written
        assert read_sae_gguf(file).training == training


def test_bos_excluded_of_files_that_others_wrote_is_kept_and_of_old_imports_is_not(tmp_path):
    for number, (training, said, kept) in enumerate((
        ("{}", False, False), ("{}", True, True), ('{"config": {}}', False, False),
        ('{"imported_from": "saelens"}', True, None),  # written of every import before it was known
        ('{"imported_from": "saelens"}', False, False),
    )):  # fmt: skip
        source = write_sae_gguf(tmp_path / f"{number}.gguf", random_sae(training={}))
        added = {"sae.0.bos_excluded": (said, BOOL)}
        old = rewrite(
            source, tmp_path / f"old{number}.gguf", added=added, fields={"sae.0.training": (training, STRING)}
        )
        back = write_sae_gguf(tmp_path / f"new{number}.gguf", read_sae_gguf(old))
        field = gguf.GGUFReader(back).get_field("sae.0.bos_excluded")
        assert (field and field.contents()) == kept
