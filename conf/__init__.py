"""The yaml files people edit: one root file per command, groups of options, whole experiments."""
