"""One file per kind of corpus; each gives its records in the order of the seed, and where it stands in them."""
