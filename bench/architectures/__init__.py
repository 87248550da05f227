"""The zoo: many architectures, each tiny, by family. `python bench/zoo.py` examines them.

A module of this package that has a function `all_of`, which returns a list of `Architecture`, is
part of the zoo. Importing it must not import the libraries that its models come from.
"""

import importlib
import pkgutil

from bench.architectures.case import Architecture


def architectures() -> dict[str, Architecture]:
    """Every architecture by its name, in the order of the modules.

    Raises:
        ValueError: two architectures have the same name.

    Example:
        >>> architectures()["gpt2"].family
        'decoder'
    """
    found: dict[str, Architecture] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for architecture in module.all_of() if hasattr(module, "all_of") else ():
            if architecture.name in found:
                raise ValueError(f"two architectures are called {architecture.name!r}")
            found[architecture.name] = architecture
    return found
