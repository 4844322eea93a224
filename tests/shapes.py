"""What checks shapes and types at run time: an int is a float, as for mypy."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
