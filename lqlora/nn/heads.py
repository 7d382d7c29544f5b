"""Output embeddings and heads of a model, and whether they train beside a quantized body."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Heads", "names_above"]

#: First components of names that are heads in models without the attributes of transformers.
_NAMES = frozenset({"classification_head", "classifier", "head", "heads", "qa_outputs", "score", "v_head"})


def names_above(name: str) -> Iterator[tuple[str, str]]:
    """Yield the names above a name, nearest first.

    Parameters
    ----------
    name : str
        Name of a module or parameter.

    Yields
    ------
    (str, str)
        A name, the empty one last, and the component that follows it.

    Examples
    --------
    >>> list(names_above("layers.0.q"))
    [('layers.0', 'q'), ('layers', '0'), ('', 'layers')]
    """
    while name:
        name, _, own = name.rpartition(".")
        yield name, own


class Heads:
    """Output embeddings and heads of a model.

    A model of transformers says where its body is, and which module is the output embedding. Everything beside the body is
    a head. Heads of other models are known by the first component of their names.

    Parameters
    ----------
    modules : mapping of str to torch.nn.Module
        All modules of the model by name, the model itself under the empty name.

    Attributes
    ----------
    inputs, outputs : set of torch.nn.Module
        Input and output embeddings of models of transformers.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.inputs: set[nn.Module] = set()
        self.outputs: set[nn.Module] = set()
        self._trains: dict[str, bool] = {}
        for name, module in modules.items():
            if _is_pretrained(module):
                self._add_beside_body(name, module)
        if not self._trains:
            embeddings = {tuple(own.weight.shape) for own in modules.values() if isinstance(own, nn.Embedding)}
            for name in _NAMES.intersection(modules[""]._modules):  # noqa: SLF001 - of torch
                # A head with one row for each token is an output embedding, which is not made for a new task.
                weight = getattr(modules[name], "weight", None) if name in modules else None
                self._trains[name] = weight is None or tuple(weight.shape) not in embeddings

    def is_head(self, name: str) -> bool:
        """Return whether a module or parameter belongs to a head.

        Parameters
        ----------
        name : str
            Name of a module or parameter.

        Returns
        -------
        bool
            True if it does.
        """
        return name in self._trains or any(above in self._trains for above, _ in names_above(name))

    def trains(self, name: str) -> bool:
        """Return whether a parameter belongs to a head that is made for a new task.

        Parameters
        ----------
        name : str
            Name of a parameter.

        Returns
        -------
        bool
            False for output embeddings, and for heads beside one, which were trained with it.
        """
        return any(self._trains.get(above) for above, _ in names_above(name))

    def _add_beside_body(self, name: str, module: nn.Module) -> None:
        """Add the heads of one model of transformers."""
        output = _embedding(module, "get_output_embeddings")
        if output is not None:
            self.outputs.add(output)
        if (embedding := _embedding(module, "get_input_embeddings")) is not None:
            self.inputs.add(embedding)
        children = module._modules  # noqa: SLF001 - of torch
        body = children.get(cast("str", module.base_model_prefix))
        for key, child in children.items():
            # A model beside the body is another part, such as the encoder of images.
            if body and child is not None and child is not body and not any(map(_is_pretrained, child.modules())):
                self._trains[f"{name}.{key}" if name else key] = output is None


def _is_pretrained(module: nn.Module) -> bool:
    """Return whether a module is a model of transformers."""
    # Asked of the class: wrappers of PEFT pass attributes of the instance on from the model inside.
    return isinstance(getattr(type(module), "base_model_prefix", None), str)


def _embedding(module: nn.Module, getter: str) -> nn.Module | None:
    """Return an embedding of a model of transformers, or None."""
    try:
        found = getattr(module, getter)()
    except Exception:  # noqa: BLE001 - code of others, which may need what this model lacks
        return None
    return found if isinstance(found, nn.Module) else None
