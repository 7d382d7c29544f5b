"""Statistics of models that are larger than the memory: block after block, from the files of the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lqlora._annotations import annotated
from lqlora._messages import given, shortened, shown
from lqlora._optional import require
from lqlora._options import require_choice
from lqlora._progress import reported
from lqlora.decomposition import decompose
from lqlora.errors import CheckpointError, InvalidArgumentError
from lqlora.integrations._block_runs import BlockRuns
from lqlora.integrations._calibration_folder import CalibrationFolder, described, digest_of, source_digest
from lqlora.integrations._disk_models import DiskModel
from lqlora.integrations.statistics import open_statistics
from lqlora.nn.block_calls import evaluated
from lqlora.nn.model import quantize_model
from lqlora.nn.statistics.batches import parts_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn

    from lqlora._patterns import Patterns
    from lqlora._typing import FloatName
    from lqlora.formats import BlockFormat
    from lqlora.integrations.statistics import Statistics

__all__ = ["calibrate_checkpoint"]


@annotated
@torch.inference_mode(mode=False)
def calibrate_checkpoint(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    gradients: bool = False,
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    quantized: BlockFormat | None = None,
    include: Patterns | None = None,
    exclude: Patterns = (),
    blocks: str | None = None,
    model_class: Any = None,
    dtype: FloatName = "float32",
    device: str = "cpu",
    progress: bool | Callable[[int, int], None] = True,
    **options: Any,
) -> Statistics:
    """Collect statistics of the layers of a model whose weights do not fit in memory, block after block.

    One block of the model is in memory at a time, and what is outside of the list of blocks, such as embeddings. The hidden states of
    all tokens are in files of ``folder`` meanwhile. If the process is killed, the same call continues after the last finished block, and
    the files at the end are the same. A call for a folder that is complete returns it.

    Parameters
    ----------
    source : path-like
        Folder of a model of transformers in safetensors files. Its body is a list of blocks that run one after another.
    folder : path-like
        Folder to write. It must not exist, be empty, or hold what an earlier call with the same arguments has left.
    batches : iterable
        Batches for calibration, as :func:`lqlora.nn.collect_gram` takes them. Padding is cut.
    gradients : bool, default False
        Also collect squared gradients at the outputs of layers. All blocks run a second time, backwards, and the hidden states before
        each of them stay in files: for each token ``blocks`` times ``hidden_size`` numbers.
    loss : callable, optional
        See :func:`lqlora.nn.collect_fisher`. It is used with ``gradients`` only.
    quantized : BlockFormat, optional
        Format in which each block is quantized after its statistics were collected, so that the next block sees what a quantized
        model would give it. By default it sees what the dense one gives.
    include, exclude : patterns
        Layers of the model, of those in the blocks: see :func:`lqlora.nn.select_linears`.
    blocks : str, optional
        Name of the list of blocks, such as ``"model.layers"``. By default it is the one list whose items hold the most layers.
    model_class : class, optional
        Class of transformers; by default ``AutoModelForCausalLM``.
    dtype : {"float32", "bfloat16", "float16"}
        Dtype of the computation. Processors without special units are slow in 16 bits.
    device : str, default "cpu"
        Device that blocks run on.
    progress : bool or callable, default True
        See :func:`lqlora.cost_table`. It counts runs of blocks.
    **options
        Options of :func:`lqlora.nn.quantize_model` for ``quantized``, such as ``rank`` or ``quantizer="gptq"``.

    Returns
    -------
    Statistics
        Second moments of the inputs by name of the matrix in the files, and squared gradients if they were asked for.

    Raises
    ------
    InvalidArgumentError
        If no layer of the blocks is selected, there is no batch, the list of blocks is not clear, or its items do not run one after
        another, once in each pass, on the output of the block before.
    CheckpointError
        If a file cannot be read or written, or the folder holds something else. Blocks that are finished are kept.
    NonFiniteError
        If an input, a loss or a gradient is NaN or infinite.
    MissingDependencyError
        If transformers or accelerate is not installed.

    Warns
    -----
    DeadLayerWarning
        If layers were not used in any batch, such as experts without tokens. They are left out.
    UserWarning
        If selected layers have no matrix in the files, such as those that the model puts together from several.

    Notes
    -----
    The statistics are those of :func:`lqlora.nn.collect_gram`, and diagonals of the first factor of
    :func:`lqlora.nn.collect_kronecker`. A pass of the model without the values of blocks, in which each block but the first returns its
    input, tells their other arguments, such as masks and positions. These stay in memory.

    References
    ----------
    GPTQ, arXiv 2210.17323, section 3.3, has one block in memory at a time.

    Examples
    --------
    >>> import tempfile, torch, transformers, lqlora as lq
    >>> from lqlora.integrations.calibration import calibrate_checkpoint
    >>> _ = torch.manual_seed(0)
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     transformers.LlamaForCausalLM(config).save_pretrained(f"{folder}/model")
    ...     tokens = torch.randint(50, (4, 16))
    ...     statistics = calibrate_checkpoint(f"{folder}/model", f"{folder}/statistics", [tokens])
    ...     fmt = lq.BlockFormat.parse("nf3/32:float32")
    ...     report = lq.decompose_checkpoint(f"{folder}/model", f"{folder}/small", fmt, rank=4, weighting=statistics.weighting())
    >>> len(statistics.inputs), statistics.examples
    (14, 4)
    """
    require_choice(dtype, "dtype", ("float32", "bfloat16", "float16"))
    if gradients and quantized is not None:
        raise InvalidArgumentError("quantized must not be given with gradients, which are those of the dense model.")
    _check_options(quantized, options)
    if isinstance(batches, Mapping | torch.Tensor):
        raise InvalidArgumentError("batches must be several batches, such as a list, got one. Pass [batch].")
    place = _device(device)
    path, target = Path(source).absolute(), Path(folder).absolute()
    make = model_class or require("transformers", "demo", "Calibration of models in files").AutoModelForCausalLM
    if not (isinstance(make, type) and hasattr(make, "from_pretrained")):
        raise InvalidArgumentError(f"model_class must be a class of transformers, got {given(make)}.")
    own = list(batches)
    _check_batches(own)
    settings = {
        "source": source_digest(path), "batches": digest_of(own), "model_class": make.__name__, "blocks": blocks, "dtype": dtype,
        "include": described(include), "exclude": described(exclude), "gradients": gradients, "loss": described(loss),
        "quantized": "" if quantized is None else f"{quantized} {[(name, described(options[name])) for name in sorted(options)]}",
    }  # fmt: skip
    try:
        with CalibrationFolder(target, settings) as work:
            if work.is_complete:
                return open_statistics(target)
            disk = DiskModel(path, make, blocks, include, exclude, getattr(torch, dtype), work.weights)
            if gradients and getattr(disk.model.config, "output_router_logits", False):
                raise InvalidArgumentError(
                    "source must not have output_router_logits in its configuration with gradients, which the loss of routers would "
                    "not reach."
                )
            run = BlockRuns(disk, work, list(_single(disk.model, own)) if gradients else own, place)
            with (
                evaluated(disk.model),
                reported(
                    progress, "Calibrating", len(disk.blocks) * (2 if gradients else 1), "block", run.done()
                ) as report,
            ):
                run.forwards(quantized, options, report, keep=gradients)
                if gradients:
                    run.backwards(loss, report)
            run.finish()
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(shortened(f"{folder} cannot be written: {error}. Finished blocks are kept.")) from error
    return open_statistics(target)


def _check_options(quantized: BlockFormat | None, options: Mapping[str, Any]) -> None:
    """Raise unless options are those of ``quantize_model``."""
    known = inspect.signature(quantize_model).parameters.keys() | inspect.signature(decompose).parameters.keys()
    for name in options:
        if quantized is None:
            raise InvalidArgumentError(f"{name} needs quantized=, the format of the blocks.")
        if name in _SET or name not in known:
            raise InvalidArgumentError(f"{name} is not an option of lqlora.nn.quantize_model that can be set here.")


#: Options of ``quantize_model`` and ``decompose`` that are set for each block.
_SET = frozenset(
    {"model", "formats", "include", "exclude", "weighting", "embeddings", "progress", "w", "fmt", "name", "start"}
)


def _device(name: str) -> torch.device:
    """Return a device, or raise if torch cannot use it."""
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise InvalidArgumentError(
            shortened(f"device must be one that torch can use, got {shown(name)}: {error}")
        ) from error
    if found.type == "meta":
        raise InvalidArgumentError("device must be one that computes, got 'meta'.")
    return found


def _check_batches(batches: Sequence[Any]) -> None:
    """Raise unless there are batches with tokens."""
    if not batches:
        raise InvalidArgumentError("batches must hold at least one batch, got none. Was an iterator used up?")
    for batch in batches:
        for own in batch.values() if isinstance(batch, Mapping) else [batch]:
            if isinstance(own, torch.Tensor) and not own.numel():
                raise InvalidArgumentError(f"batches must have tokens, got a tensor of shape {tuple(own.shape)}.")


def _single(model: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the examples of batches one by one."""
    for batch in batches:
        if isinstance(batch, torch.Tensor) and batch.ndim:
            yield from batch.split(1)
        else:
            yield from parts_of(model, batch, one_by_one=True)
