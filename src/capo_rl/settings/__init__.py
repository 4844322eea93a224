"""What a run is asked to be. `own_fields` are CAPO's, `own` what follows from them whoever trains, and `config`
puts them on top of TRL's; `fields` says which of
TRL's a recipe can't keep; `recipe_file` and `recipe` read a YAML file (`strict_yaml`: no key twice), also a `packaged`
one; `train_help` is the help about it."""
