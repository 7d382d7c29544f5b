"""Folders of LoRA adapters of PEFT: their settings, their tensors, and the bases that they belong to."""

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
from lqlora._documents import Reader, Text, key_step
from lqlora._files import input_file, replace_file, write_whole
from lqlora._messages import shortened, shown
from lqlora.errors import CheckpointError, LQLoRAError
from lqlora.integrations._schema import LoraSettings
from lqlora.nn.adapters import Factors

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    import torch

    from lqlora.checkpoint import StoredMatrix

__all__ = ["ROOT", "adapter_settings", "check_bases", "read_adapter", "write_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: PEFT's names of the entries begin with this.
ROOT = "base_model.model."
_ENTRY = re.compile(rf"{re.escape(ROOT)}(.+)\.lora_([AB])\.weight", re.DOTALL)

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


#: Key of the metadata under which the fingerprints of the bases are kept.
_BASES = "lqlora_bases"


def write_adapter(
    folder: str | os.PathLike[str],
    found: Mapping[str, Factors],
    settings: Mapping[str, Any],
    bases: Mapping[str, str] | None = None,
) -> None:
    """Write factors as an adapter. Files of an older one are replaced.

    Parameters
    ----------
    folder : path-like
        Folder, which is made if it does not exist.
    found : mapping of str to Factors
        Tensors of torch by layer.
    settings : mapping
        Result of :func:`adapter_settings`.
    bases : mapping of str to str, optional
        Fingerprint of the quantized part of each layer. PEFT does not look at it.

    Raises
    ------
    CheckpointError
        If a file cannot be written.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        # Without its settings an adapter cannot be loaded, so a crash never leaves new weights beside old settings.
        (target / CONFIG).unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(shortened(f"{folder} cannot be written: {error}.")) from error
    tensors = {
        _entry_of(name, key): matrix.contiguous()
        for name, own in found.items()
        for key, matrix in (("A", own.lora_A), ("B", own.lora_B))
    }
    metadata = {"format": "pt"} if bases is None else {"format": "pt", _BASES: json.dumps(dict(bases))}
    with replace_file(target / WEIGHTS, SafetensorError) as beside:
        save_file(tensors, beside, metadata=metadata)
    write_whole(target / CONFIG, f"{json.dumps(settings, indent=2)}\n".encode())


def check_bases(folder: str | os.PathLike[str], bases: Mapping[str, str], advice: str) -> None:
    """Raise if an adapter says that it belongs to other quantized parts.

    Parameters
    ----------
    folder : path-like
        Folder of the adapter. Those that PEFT wrote say nothing.
    bases : mapping of str to str
        Fingerprints of the layers of the model.
    advice : str
        Last sentence of the error.

    Raises
    ------
    CheckpointError
        If a fingerprint is another one.
    """
    path = Path(folder) / WEIGHTS
    try:
        with safe_open(input_file(path, CheckpointError), framework="numpy") as file:
            text = (file.metadata() or {}).get(_BASES)
    except (OSError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(shortened(f"{path} is not a readable safetensors file ({error}).")) from error
    found = {} if text is None else Reader(f"{path} has damaged metadata", CheckpointError).read(text, dict[Text, Text])
    for name, own in found.items():
        if name in bases and bases[name] != own:
            raise CheckpointError(
                shortened(
                    f"{folder} belongs to another quantized part of {shown(name)}, and would correct errors that this one does not have. "
                    f"{advice}"
                )
            )


def read_adapter(folder: str | os.PathLike[str]) -> dict[str, Factors]:
    """Return the factors of an adapter.

    Parameters
    ----------
    folder : path-like
        Folder of PEFT's ``save_pretrained``.

    Returns
    -------
    dict of str to Factors
        Tensors of torch in host memory, by layer.

    Raises
    ------
    CheckpointError
        If the folder is not a LoRA adapter or is damaged, or has what factors cannot stand for.
    """
    config = input_file(Path(folder) / CONFIG, CheckpointError)
    reader = Reader(f"{config} is not an adapter that factors can hold", CheckpointError)
    settings = _settings(reader, config)
    matrices = _matrices(Path(folder) / WEIGHTS)
    ranks = _values(reader, "rank_pattern", settings.rank_pattern, settings.r, matrices)
    alphas = _values(reader, "alpha_pattern", settings.alpha_pattern, settings.lora_alpha, matrices)
    found = {}
    for name, pair in matrices.items():
        rank = ranks[name]
        fits = len(pair) == 2 and pair["A"].ndim == pair["B"].ndim == 2
        if not fits or len(pair["A"]) != rank or pair["B"].shape[1] != rank:
            raise CheckpointError(
                shortened(f"{folder} is inconsistent: {shown(name)} must have lora_A and lora_B of rank {rank}.")
            )
        scaling = alphas[name] / (math.sqrt(rank) if settings.use_rslora else rank)
        found[name] = Factors(pair["A"], pair["B"], scaling)
    return found


def _entry_of(name: str, letter: str) -> str:
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
    >>> _entry_of("model.layers.0.up", "A")
    'base_model.model.model.layers.0.up.lora_A.weight'
    """
    return f"{ROOT}{name}.lora_{letter}.weight"


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


def _settings(reader: Reader, path: Path) -> LoraSettings:
    """Return the settings of a folder, or raise if they ask for more than a low-rank product."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(shortened(f"{path} cannot be read: {error}.")) from error
    plain = reader.parse(text)
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
