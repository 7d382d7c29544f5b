"""PEFT on top of quantized models, and low-rank factors as adapter folders of PEFT.

:func:`register` lets PEFT put LoRA, DoRA and IA3 over :class:`lqlora.nn.LQLinear`, and prompts before quantized embeddings. :func:`save_adapter` and
:func:`load_adapter` write and read the folders of PEFT's ``save_pretrained``, and work without PEFT.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401 - teaches NumPy the bfloat16 that safetensors reads
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lqlora import ops
from lqlora._annotations import annotated
from lqlora._documents import Reader, key_step
from lqlora._files import input_file, replace_file, write_whole
from lqlora._messages import shortened, shown
from lqlora._optional import require
from lqlora._options import require_kind
from lqlora.errors import CheckpointError, InvalidArgumentError, LQLoRAError
from lqlora.integrations._schema import LoraSettings
from lqlora.nn.adapters import Factors, factors, set_factors

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    import torch
    from torch import nn

    from lqlora.checkpoint import StoredMatrix

__all__ = ["load_adapter", "register", "save_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: PEFT's names of the entries begin with this.
_ROOT = "base_model.model."
_ENTRY = re.compile(rf"{re.escape(_ROOT)}(.+)\.lora_([AB])\.weight", re.DOTALL)

#: Settings that change nothing in ``scaling * lora_B @ lora_A``: where the adapter came from, how it was made, and which
#: layers have it, which the weights say again.
_HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type",
}) | {*LoraSettings.__struct_fields__}  # fmt: skip

#: Starts that change the weight below, so that the factors are differences from other factors, which the folder lacks.
_CHANGING = re.compile(r"pissa.*|olora|corda|lora_ga|mica", re.IGNORECASE)

#: Characters of regular expressions, except the dot between the parts of a name, and characters that stand for themselves.
_SPECIAL, _ESCAPED = re.compile(r"[\\*+?()\[\]{}|^$]"), re.compile(r"\\(\W)")


def register() -> None:
    """Let PEFT put LoRA, DoRA and IA3 over quantized layers, and prompts before quantized embeddings.

    Call it once in a process, before ``get_peft_model``, ``PeftModel.from_pretrained`` or a trainer that takes a
    configuration of PEFT. Calls after the first change nothing. Models without quantized layers work as before.

    Raises
    ------
    MissingDependencyError
        If PEFT is not installed.

    Notes
    -----
    ``get_peft_model`` freezes the model below, factors of :class:`lqlora.nn.LQLinear` included. Set ``requires_grad`` afterwards
    to train them, too, and keep them with :func:`lqlora.nn.save_factors`: ``save_pretrained`` writes only PEFT's adapters.

    ``merge_adapter`` and ``merge_and_unload`` put a ``torch.nn.Linear``, or the transposed ``Conv1D`` of GPT-2, in the place of
    each layer that has an adapter. It holds the sum of all parts, in the dtype of the rest of the model. ``unmerge_adapter`` puts the quantized layer back, bit for bit.
    Starts that subtract a part of the weight, such as PiSSA, are refused, and quantized embeddings in ``modules_to_save``.

    ``target_parameters`` of ``LoraConfig`` may name arrays of experts that were quantized, and ``target_modules`` may name them
    or single experts. Each expert gets an adapter of its own. Such adapters are products of two factors: DoRA, dropout, IA3 and
    batches with several adapters are refused for experts.
    """
    require("peft", "peft", "lqlora.integrations.peft.register")
    from lqlora.integrations._peft_layers import register_tuners  # noqa: PLC0415 - imports PEFT

    register_tuners()


@annotated
def save_adapter(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write the low-rank factors of a model as a LoRA adapter of PEFT.

    The adapter belongs to the quantized part alone: ``Q + scaling * lora_B @ lora_A``. Load it over the same codes and scales
    with factors of rank 0, or over a dense model with the decoded values. Over the original weights it is wrong, because
    the factors stand for a part of them.

    Parameters
    ----------
    folder : path-like
        Folder for ``adapter_config.json`` and ``adapter_model.safetensors``. It is made if it does not exist. Files of an
        older adapter are replaced.
    model : torch.nn.Module
        A model with quantized layers. Layers of rank 0 are left out.
    base_model : str, optional
        Name or folder of the model with the quantized part, for ``base_model_name_or_path``.
    task_type : str, optional
        PEFT's name of the task, such as ``"CAUSAL_LM"``.

    Raises
    ------
    InvalidArgumentError
        If the model has no quantized layer with a rank, or is wrapped by PEFT.
    CheckpointError
        If a file cannot be written.

    Notes
    -----
    Each layer keeps its rank and scaling, in ``rank_pattern`` and ``alpha_pattern`` where they differ from those of most
    layers. PEFT computes the scaling as alpha / rank in float64, so it may differ in the last of its 53 bits. Dropout is
    not written.
    """
    for option, text in (("base_model", base_model), ("task_type", task_type)):
        require_kind(text, option, (str, type(None)), "a text")  # before the old settings are removed
    all_factors = factors(model)
    if wrapped := next((name for name in all_factors if name.endswith(".base_layer") or name.startswith(_ROOT)), None):
        raise InvalidArgumentError(
            f"model must not be wrapped by PEFT, got the layer {shown(wrapped)}. Save the model that PEFT wraps."
        )
    found = {name: own for name, own in all_factors.items() if len(own.lora_A)}
    if not found:
        raise InvalidArgumentError("model must have a quantized layer with a rank above 0, got ranks of 0 only.")
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        # Without its settings an adapter cannot be loaded, so a crash never leaves new weights beside old settings.
        (target / CONFIG).unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(shortened(f"{folder} cannot be written: {error}.")) from error
    tensors = {
        entry_of(name, key): matrix.contiguous()
        for name, own in found.items()
        for key, matrix in (("A", own.lora_A), ("B", own.lora_B))
    }
    with replace_file(target / WEIGHTS, SafetensorError) as beside:
        save_file(tensors, beside, metadata={"format": "pt"})
    names = [name for name, _ in model.named_modules()]
    text = json.dumps(adapter_settings(found, names, base_model, task_type), indent=2)
    write_whole(target / CONFIG, f"{text}\n".encode())


def entry_of(name: str, letter: str) -> str:
    """Return PEFT's name of a factor.

    Parameters
    ----------
    name : str
        Name of the layer.
    letter : {"A", "B"}
        Which factor.

    Returns
    -------
    str
        Key in ``adapter_model.safetensors``.

    Examples
    --------
    >>> entry_of("model.layers.0.up", "A")
    'base_model.model.model.layers.0.up.lora_A.weight'
    """
    return f"{_ROOT}{name}.lora_{letter}.weight"


def adapter_settings(
    found: Mapping[str, Factors | StoredMatrix], names: Iterable[str], base_model: str | None, task_type: str | None
) -> dict[str, Any]:
    """Return the settings of an adapter.

    Parameters
    ----------
    found : mapping of str to Factors or StoredMatrix
        Layers with factors of a rank above 0.
    names : iterable of str
        Names of all modules of the model.
    base_model, task_type : str, optional
        See :func:`save_adapter`.

    Returns
    -------
    dict
        Content of ``adapter_config.json``.
    """
    ranks = {name: len(own.lora_A) for name, own in found.items()}
    alphas = {name: _alpha(own.scaling, ranks[name]) for name, own in found.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": _targets(found, names),
        "rank_pattern": {_pattern(name): own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {_pattern(name): own for name, own in alphas.items() if own != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _alpha(scaling: float, rank: int) -> float:
    """Return the alpha for which alpha / rank is the scaling, exactly if there is one."""
    near = scaling * rank
    candidates = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    found = next((alpha for alpha in candidates if alpha / rank == scaling), near)
    return int(found) if found.is_integer() and abs(found) < 2**53 else found


def _pattern(name: str) -> str:
    """Return PEFT's pattern that matches one layer alone. Without the anchor a shorter name matches the end of longer ones."""
    return f"^{re.escape(name)}"


def _targets(found: Mapping[str, Any], names: Iterable[str]) -> list[str] | str:
    """Return the names of layers, or a regular expression if a name in a list would match the end of another module's, too."""
    others = {name for name in names if name not in found}
    if any(suffix in found for name in others for suffix in _ends(name)):
        return "|".join(re.escape(name) for name in sorted(found))
    return sorted(found)


def _ends(name: str) -> Iterable[str]:
    """Return what is left of a name without its first parts: all of it, then less and less."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


@annotated
def load_adapter(folder: str | os.PathLike[str], model: nn.Module) -> None:
    """Load a LoRA adapter of PEFT into the low-rank factors of a model, in place of those that it has.

    Parameters
    ----------
    folder : path-like
        Folder of :func:`save_adapter` or of PEFT's ``save_pretrained``.
    model : torch.nn.Module
        A model with quantized layers. It is changed only after the folder was checked. Layers without an adapter
        get rank 0. :func:`lqlora.nn.set_factors` says what happens to parameters.

    Raises
    ------
    CheckpointError
        If the folder is not a LoRA adapter or is damaged, does not fit the model, or has what factors cannot stand for:
        DoRA, biases, other modules, patterns that are not names, and starts such as PiSSA that change the weight below.
    InvalidArgumentError
        If the model has no quantized layer, or is one itself.
    """
    old = factors(model)
    config = input_file(Path(folder) / CONFIG, CheckpointError)
    reader = Reader(f"{config} is not an adapter that factors can hold", CheckpointError)
    settings = _settings(reader, config)
    matrices = _matrices(Path(folder) / WEIGHTS)
    if left := sorted(matrices.keys() - old.keys()):
        raise CheckpointError(
            shortened(
                f"{folder} does not fit the model, which has no quantized layer {shown(left[0])} ({len(left)} in all)."
            )
        )
    ranks = _values(reader, "rank_pattern", settings.rank_pattern, settings.r, matrices)
    alphas = _values(reader, "alpha_pattern", settings.alpha_pattern, settings.lora_alpha, matrices)
    given = {}
    for name, own in old.items():
        if name not in matrices:
            given[name] = Factors(own.lora_A[:0], own.lora_B[:, :0], own.scaling)
            continue
        pair = matrices[name]
        if len(pair) < 2 or pair["A"].ndim != 2 or len(pair["A"]) != ranks[name]:
            raise CheckpointError(
                shortened(f"{folder} is inconsistent: {shown(name)} must have lora_A and lora_B of rank {ranks[name]}.")
            )
        scaling = alphas[name] / (math.sqrt(ranks[name]) if settings.use_rslora else ranks[name])
        given[name] = Factors(pair["A"], pair["B"], scaling)
    try:
        set_factors(model, given)
    except LQLoRAError as error:
        raise CheckpointError(shortened(f"{folder} does not fit the model: {error}")) from None


def _settings(reader: Reader, path: Path) -> LoraSettings:
    """Return the settings of a folder, or raise if they ask for more than a low-rank product."""
    try:
        plain = reader.parse(path.read_bytes())
    except OSError as error:
        raise CheckpointError(shortened(f"{path} cannot be read: {error}.")) from error
    settings = reader.convert(plain, LoraSettings)
    for key, value in plain.items():
        if key not in _HARMLESS and value not in (None, False, "none", [], {}):
            raise reader.fault(key_step(key), f"must be off, got {shown(value)}.")
    start = settings.init_lora_weights
    if isinstance(start, str) and _CHANGING.fullmatch(start):
        why = "must not change the weight below"
        raise reader.fault(
            "init_lora_weights", f"{why}, got {shown(start)}. Convert the adapter to plain LoRA with PEFT."
        )
    return settings


def _matrices(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return the factors of a folder by layer, then by the letter in their name."""
    own = input_file(path, CheckpointError)
    found: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(own, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                if not (match := _ENTRY.fullmatch(key)):
                    raise CheckpointError(
                        shortened(
                            f"{path} must hold lora_A and lora_B of linear layers only, got {shown(key)}. Factors cannot stand "
                            "for magnitudes of DoRA, biases, embeddings and whole modules."
                        )
                    )
                tensor = file.get_tensor(key)
                ops.require_finite(ops.widen(tensor, shown(key)), shown(key))
                found.setdefault(match[1], {})[match[2]] = tensor
    except LQLoRAError as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(shortened(f"{path}: {error}")) from None
    except (AttributeError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(shortened(f"{path} is not a readable safetensors file ({error}).")) from error
    if not found:
        raise CheckpointError(shortened(f"{path} must hold lora_A and lora_B of a layer, got no tensor."))
    return found


def _values(
    reader: Reader, field: str, patterns: Mapping[str, Any] | None, usual: Any, names: Iterable[str]
) -> dict[str, Any]:
    """Return the value of each layer, of the first pattern that matches its name."""
    # Patterns are looked up as names and never run: a regular expression of a file may take exponential time.
    place: dict[str, int] = {}
    values = [*(patterns or {}).values(), usual]
    for index, pattern in enumerate(patterns or {}):
        anchored = pattern.startswith("^")
        name = pattern.removeprefix("^")
        if _SPECIAL.search(_ESCAPED.sub("", name)):
            raise reader.fault(f"{field}{key_step(pattern)}", "must be the name of a layer, or the end of names.")
        name = _ESCAPED.sub(r"\1", name)
        place.setdefault(f"^{name}" if anchored else name, index)
    return {
        name: values[min([len(values) - 1, *(place[own] for own in (f"^{name}", *_ends(name)) if own in place)])]
        for name in names
    }
