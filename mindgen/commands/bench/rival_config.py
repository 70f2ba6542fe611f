"""What transformers is told of the model: found without loading it, before any weight is read."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from mindgen.weights.config_json import config_from_spec, spec_from_config
from mindgen.weights.families import find_family, model_type_of
from mindgen.weights.families.family import Config
from mindgen.weights.huggingface import read_json
from mindgen.weights.source import Source


def find_config(source: Source, shape: Path | None) -> Config:
    """The `config.json` with which transformers makes the model of `source`.

    It is made from the spec; where that cannot be, it is the model's own. shape: the file that random weights are of.
    Raises ValueError if transformers has no such models, or if their own file is needed and not there.
    """
    family, model_type = find_family(source.spec.family), model_type_of(source.spec.family)
    if not is_known(model_type):
        raise ValueError(f"--vs hf: transformers has no {model_type}; leave it out")
    if family.translate is None:
        return config_from_spec(source.spec)
    paths = [folder / "config.json" for folder in source.text_folders] + ([shape] if shape else [])
    for path in filter(Path.exists, paths):
        config = read_json(path)
        if spec_from_config(config, source.spec.dtype, str(path)) == source.spec:
            return config
    raise ValueError(
        f"--vs hf needs the config.json of a {model_type} model, and {source.path} has none that states this model; "
        "put it there, or leave out --vs hf"
    )


def is_known(model_type: str) -> bool:
    """Whether transformers has models of a type, by its files: loading it would count as memory of ours."""
    package = find_spec("transformers")
    folders = (package.submodule_search_locations if package else None) or ()
    name = f"models/{model_type}/configuration_{model_type}.py"
    return any((Path(folder) / name).is_file() for folder in folders)
