"""Decomposition of model files matrix by matrix: content, layouts, interruptions, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import re
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lqlora as lq
from lqlora._optional import is_installed
from lqlora._threads import cores
from lqlora.checkpoint.quantization_config import MatrixFormat, read_matrices
from lqlora.errors import CheckpointError, InvalidArgumentError, NonFiniteError
from lqlora.integrations import _streaming_tasks
from lqlora.integrations.bitsandbytes import to_bitsandbytes
from lqlora.integrations.sources import open_model
from tests.requirements import require_or_skip

FORMAT = lq.BlockFormat.parse("nf3/16:u8/256:float32")
SMALL = 4000  # bytes of a file, so that the model below is written in several


def values(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.fixture
def source(tmp_path):
    """A model in two parts with a configuration: six matrices, some in bfloat16, and other tensors."""
    folder = tmp_path / "dense"
    folder.mkdir()
    tensors = {"model.embed_tokens.weight": values((40, 32), 9, ml_dtypes.bfloat16)}
    for layer in range(3):
        tensors |= {
            f"model.layers.{layer}.up.weight": values((48, 32), layer, ml_dtypes.bfloat16),
            f"model.layers.{layer}.down.weight": values((32, 48), 10 + layer),
            f"model.layers.{layer}.norm.weight": values((32,), 20 + layer, np.float16),
        }
    tensors |= {"steps": np.array(7, np.int64), "kernel": values((2, 3, 4), 5), "mask": np.ones((4, 4), bool)}
    names = sorted(tensors)
    for number, part in ((1, names[:7]), (2, names[7:])):
        save_file({name: tensors[name] for name in part}, folder / f"model-0000{number}-of-00002.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 32}))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder, tensors


def run(source, folder, formats=FORMAT, **options):
    options = {"rank": 4, "max_iter": 3, "shard_bytes": SMALL, "progress": False} | options
    return lq.decompose_checkpoint(source, folder, formats, **options)


def files_of(folder):
    """Return the bytes of each file of a folder, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestContent:
    def test_each_matrix_is_decomposed_and_all_else_copied(self, source, tmp_path):
        folder, tensors = source
        report = run(folder, tmp_path / "small")
        content = lq.verify(tmp_path / "small")
        expected = [name.removesuffix(".weight") for name in tensors if name.endswith(("up.weight", "down.weight"))]
        assert sorted(content.matrices) == sorted(expected) == sorted(report.matrices)
        for name, found in content.matrices.items():
            matrix = tensors[f"{name}.weight"].astype(np.float32)
            own = lq.decompose(matrix, FORMAT, 4, max_iter=3)
            assert found.quantized.packed.tobytes() == own.quantized.packed.tobytes()
            assert found.lora_A.tobytes() == own.lora_A.tobytes()
            assert found.lora_B.tobytes() == own.lora_B.tobytes()
            assert report.matrices[name].relative_error == own.relative_error
        assert content.tensors.keys() == report.copied.keys()
        assert content.tensors.keys() == tensors.keys() - {f"{name}.weight" for name in expected}
        for name, found in content.tensors.items():
            assert (found.dtype, found.shape) == (tensors[name].dtype, tensors[name].shape)
            assert found.tobytes() == tensors[name].tobytes()

    def test_the_folder_is_one_that_other_programs_know(self, source, tmp_path):
        folder, target = source[0], tmp_path / "small"
        report = run(folder, target)
        count = len(report.files)
        assert count > 2
        names = {f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)}
        assert {path.name for path in target.iterdir()} == names | {
            "config.json", "lqlora.json", "model.safetensors.index.json", "tokenizer.json",
        }  # fmt: skip
        index = json.loads((target / "model.safetensors.index.json").read_text())
        stored = {}
        for name in names:
            stored |= dict.fromkeys(load_file(target / name), name)
            assert lq.verify(target / name).matrices.keys() | lq.verify(target / name).tensors.keys()
        assert index["weight_map"] == stored
        assert index["metadata"]["total_size"] == report.total_bytes
        config = json.loads((target / "config.json").read_text())
        described = config.pop("quantization_config")
        assert config == {"model_type": "llama", "hidden_size": 32}
        assert read_matrices(described, "config") == dict.fromkeys(report.matrices, MatrixFormat(FORMAT, 4, 1.0))
        assert (target / "tokenizer.json").read_text() == '{"a": 1}'

    def test_sizes_are_exact_and_a_dry_run_tells_them_before(self, source, tmp_path):
        folder, target = source[0], tmp_path / "small"
        planned = run(folder, target, dry_run=True)
        assert not target.exists()
        report = run(folder, target)
        assert planned.total_bytes == report.total_bytes
        assert planned.copied == report.copied
        assert planned.files.keys() == report.files.keys()
        total = 0
        for name, size in planned.files.items():
            with safe_open(target / name, framework="numpy") as file:
                data = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118 - not a mapping
            assert data == size < report.files[name]
            assert size <= SMALL or len(lq.load(target / name).tensors) == 1
            total += data
        assert total == report.total_bytes
        assert planned.seconds > 0
        assert planned.memory_bytes > 0
        assert "estimated" in str(planned)
        assert "estimated" not in str(report)
        assert f"{report.bits_per_weight:.3f} bits" in str(report)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_errors_are_those_of_factors_as_stored(self, source, tmp_path, dtype):
        folder, tensors = source
        report = run(folder, tmp_path / "small", factor_dtype=dtype)
        for name, found in lq.load(tmp_path / "small").matrices.items():
            assert str(found.lora_A.dtype) == str(found.lora_B.dtype) == dtype
            matrix = tensors[f"{name}.weight"].astype(np.float32)
            product = found.lora_B.astype(np.float32) @ found.lora_A.astype(np.float32)
            error = lq.relative_error(matrix, lq.dequantize(found.quantized) + product)
            assert report.matrices[name].relative_error == pytest.approx(error, rel=1e-6)

    def test_factors_that_a_dtype_cannot_hold_are_refused(self, tmp_path):
        save_file({"a": values((32, 32)) * np.float32(1e12)}, tmp_path / "m.safetensors")
        with pytest.raises(InvalidArgumentError, match=r"factor_dtype.*'a'.*bfloat16"):
            run(tmp_path / "m.safetensors", tmp_path / "small", factor_dtype="float16")
        run(tmp_path / "m.safetensors", tmp_path / "other", factor_dtype="bfloat16")

    def test_formats_and_ranks_by_pattern_by_function_and_by_plan(self, source, tmp_path):
        folder = source[0]
        other = lq.BlockFormat.parse("nf4/16:float32")
        run(folder, tmp_path / "a", {"*.up": other, "*.layers.1.*": FORMAT}, rank={"*.up": 2, "*": 3})
        run(
            folder,
            tmp_path / "b",
            lambda name: other if name.endswith("up") else FORMAT,
            rank=len,
            include="*.layers.*",
        )
        found = {
            name: (str(own.quantized.format), len(own.lora_A)) for name, own in lq.load(tmp_path / "a").matrices.items()
        }
        assert found == {
            "model.layers.0.up": (str(other), 2),
            "model.layers.1.down": (str(FORMAT), 3),
            "model.layers.1.up": (str(other), 2),
            "model.layers.2.up": (str(other), 2),
        }
        assert {len(own.lora_A) for own in lq.load(tmp_path / "b").matrices.values()} == {
            len("model.layers.0.up"),
            len("model.layers.0.down"),
        }
        table = lq.cost_table(open_model(folder).select("*"), [FORMAT, other], ranks=[2, 4], progress=False)
        plan = lq.allocate(table, bits_per_weight=7)
        run(folder, tmp_path / "c", plan, rank=None)
        matrices = lq.load(tmp_path / "c").matrices
        assert {name: own.quantized.format for name, own in matrices.items()} == plan.formats
        assert {name: len(own.lora_A) for name, own in matrices.items()} == plan.ranks

    def test_a_rank_above_the_smaller_side_is_clipped_and_said(self, source, tmp_path):
        report = run(source[0], tmp_path / "small", rank=40)
        assert {(own.rank, own.clipped_from) for own in report.matrices.values()} == {(32, 40)}
        assert "clipped" in str(report)
        with pytest.raises(InvalidArgumentError, match=r"at most 32.*got 40"):
            run(source[0], tmp_path / "strict", rank=40, strict=True)

    def test_strict_names_arrays_that_stay_dense(self, source, tmp_path):
        with pytest.raises(InvalidArgumentError, match=r"strict.*kernel \(96 bytes\)"):
            run(source[0], tmp_path / "small", strict=True)
        with pytest.raises(InvalidArgumentError, match=r"strict.*kernel.*layers\.0\.down"):
            run(source[0], tmp_path / "small", {"*.up": FORMAT}, strict=True, exclude="*embed*")
        assert not (tmp_path / "small").exists()
        (folder := tmp_path / "two").mkdir()
        save_file(
            {"a.weight": values((32, 32)), "b.weight": values((32, 32)), "embed.weight": values((4, 32))},
            folder / "m.safetensors",
        )
        run(folder, tmp_path / "small", strict=True)
        run(folder, tmp_path / "other", strict=True, exclude=["b", "embed"])

    def test_norms_may_be_read_when_they_are_needed(self, source, tmp_path):
        folder, tensors = source
        name = "model.layers.0.up"
        norm = lq.weighting.InputGram(np.cov(values((100, 32)), rowvar=False))
        run(folder, tmp_path / "a", weighting={name: norm})
        run(folder, tmp_path / "b", weighting={name: lambda: norm})
        assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
        own = lq.decompose(tensors[f"{name}.weight"].astype(np.float32), FORMAT, 4, weighting=norm, max_iter=3)
        assert lq.load(tmp_path / "a").matrices[name].lora_A.tobytes() == own.lora_A.tobytes()
        with pytest.raises(InvalidArgumentError, match=r"weighting.*'?other"):
            run(folder, tmp_path / "c", weighting={"other": norm})

    def test_a_name_that_is_given_whole_is_taken_although_it_is_dense_by_default(self, source, tmp_path):
        name = "model.embed_tokens"
        for number, formats in enumerate([{"*": FORMAT, name: FORMAT}, {"*": FORMAT}, FORMAT]):
            options = {"include": ["*.up", name]} if formats is FORMAT else {}
            run(source[0], tmp_path / str(number), formats, **options)
            matrices = lq.load(tmp_path / str(number)).matrices
            assert (name in matrices) == (number != 1)
            assert "model.layers.0.up" in matrices

    def test_parameters_that_are_not_called_weight_stay_dense(self, tmp_path):
        tensors = {
            "a.weight": values((32, 32)),
            "mixer.A_state": values((32, 8)),
            "q_norm.weight": values((8, 32)),
            "mlp.gate.wg.weight": values((8, 32)),
        }
        save_file(tensors, tmp_path / "m.safetensors")
        assert list(run(tmp_path / "m.safetensors", tmp_path / "a").matrices) == ["a"]
        assert list(run(tmp_path / "m.safetensors", tmp_path / "b", exclude=()).matrices) == [
            "a",
            "mixer.A_state",
            "mlp.gate.wg",
            "q_norm",
        ]
        report = run(tmp_path / "m.safetensors", tmp_path / "c", include=["a", "mixer.A_state"])
        assert list(report.matrices) == ["a", "mixer.A_state"]

    def test_numbers_of_numpy_are_options(self, source, tmp_path):
        run(
            source[0],
            tmp_path / "a",
            seed=np.int64(0),
            max_iter=np.int64(3),
            rank=np.int64(4),
            shard_bytes=np.int64(SMALL),
        )
        run(source[0], tmp_path / "b")
        assert files_of(tmp_path / "a") == files_of(tmp_path / "b")

    def test_relative_paths_hold_when_the_working_directory_changes(self, source, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        run(source[0].name, "small", progress=lambda *_: monkeypatch.chdir("/"))
        lq.verify(tmp_path / "small")

    def test_a_source_that_changes_its_shapes_meanwhile_is_named(self, source, tmp_path):
        folder, _ = source
        path = folder / "model-00002-of-00002.safetensors"

        def change(done, total):
            if done == 1:
                save_file({name: np.ones((64, 64), np.float32) for name in load_file(path)}, path)

        with ThreadPoolExecutor(1) as one, pytest.raises(CheckpointError, match="other values in"):
            run(folder, tmp_path / "small", progress=change, executor=one)

    def test_empty_matrices_alone(self, tmp_path):
        save_file({"a.weight": np.zeros((0, 16), np.float32)}, tmp_path / "m.safetensors")
        report = run(tmp_path / "m.safetensors", tmp_path / "small", dry_run=True)
        assert "nan" in str(report)

    def test_many_matrices_in_one_file_need_few_open_files(self, tmp_path):
        resource = pytest.importorskip("resource")
        save_file({f"{i}.weight": values((4, 16), i) for i in range(300)}, tmp_path / "m.safetensors")
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len([*Path("/proc/self/fd").iterdir()]) + 40, limits[1]))
        try:
            run(tmp_path / "m.safetensors", tmp_path / "small", rank=0, max_iter=1, shard_bytes=2**20)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert len(lq.verify(tmp_path / "small").matrices) == 300

    def test_results_do_not_pile_up_while_files_are_written(self, tmp_path, monkeypatch):
        save_file({f"{i}.weight": values((4, 16), i) for i in range(100)}, tmp_path / "m.safetensors")
        made, taken, most = [], [], []
        start = _streaming_tasks.Finished.__init__

        def count(self, *arguments):
            start(self, *arguments)
            made.append(1)
            most.append(len(made) - len(taken))

        monkeypatch.setattr(_streaming_tasks.Finished, "__init__", count)

        def slow(done, total):
            taken.append(1)
            time.sleep(0.002)

        run(tmp_path / "m.safetensors", tmp_path / "small", rank=0, max_iter=1, progress=slow)
        assert max(most) <= 4 * cores() + 1

    @pytest.mark.parametrize(
        "text", ["nf2/16:u4/8:float16", "affine4/32:float32", "tcq2/32:u8/256:float32", "nf3/16@0~both:float32"]
    )
    def test_every_kind_of_format(self, source, tmp_path, text):
        fmt = lq.BlockFormat.parse(text)
        report = run(source[0], tmp_path / "small", fmt, rank=2, max_iter=1)
        assert {own.quantized.format for own in lq.verify(tmp_path / "small").matrices.values()} == {fmt}
        assert report.total_bytes == sum(own.nbytes + own.factor_bytes for own in report.matrices.values()) + sum(
            report.copied.values()
        )

    def test_fitted_levels_and_a_codebook_of_the_caller(self, source, tmp_path):
        run(source[0], tmp_path / "a", fit="levels+scale")
        assert all(own.quantized.format.levels != "codebook" for own in lq.verify(tmp_path / "a").matrices.values())
        book = lq.Codebook(np.array([-1, -0.3, 0.2, 1], np.float32), "mine")
        report = run(source[0], tmp_path / "b", lq.BlockFormat(book, 16))
        planned = run(source[0], tmp_path / "c", lq.BlockFormat(book, 16), dry_run=True)
        assert report.total_bytes == planned.total_bytes
        found = lq.verify(tmp_path / "b").matrices["model.layers.0.up"].quantized.format.codebook
        np.testing.assert_array_equal(found.levels, book.levels)

    @pytest.mark.parametrize("pool", [ThreadPoolExecutor, ProcessPoolExecutor])
    def test_every_executor_writes_the_same_bytes(self, source, tmp_path, pool):
        run(source[0], tmp_path / "a")
        with pool(2) as executor:
            run(source[0], tmp_path / "b", executor=executor)
        assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


class TestSources:
    def test_experts_in_one_array_are_matrices(self, tmp_path):
        experts = values((3, 24, 32))
        save_file({"mlp.experts.down_proj": experts, "mlp.gate.weight": values((3, 32))}, tmp_path / "m.safetensors")
        run(tmp_path / "m.safetensors", tmp_path / "small")
        content = lq.load(tmp_path / "small")
        assert list(content.tensors) == ["mlp.gate.weight"]
        for index, matrix in enumerate(experts):
            own = lq.decompose(matrix, FORMAT, 4, max_iter=3)
            assert content.matrices[f"mlp.experts.down_proj.{index}"].lora_A.tobytes() == own.lora_A.tobytes()
        with pytest.raises(InvalidArgumentError, match=r"all matrices of.*down_proj.*'mlp\.experts\.down_proj\.1'"):
            run(tmp_path / "m.safetensors", tmp_path / "other", exclude="down_proj.1")

    def test_four_bit_weights_of_bitsandbytes_are_decoded(self, tmp_path):
        q = lq.quantize(values((32, 48)), lq.BlockFormat.parse("nf4/64:float32"))
        flat = to_bitsandbytes(lq.quantize(values((64,)), lq.BlockFormat.parse("nf4/64:float32")), "flat.weight")
        save_file(to_bitsandbytes(q, "a.weight") | flat, tmp_path / "m.safetensors")
        run(tmp_path / "m.safetensors", tmp_path / "small")
        own = lq.decompose(lq.dequantize(q), FORMAT, 4, max_iter=3)
        content = lq.load(tmp_path / "small")
        assert content.matrices["a"].lora_A.tobytes() == own.lora_A.tobytes()
        assert content.tensors.keys() == {"flat.weight"}

    def test_a_gguf_file(self, tmp_path):
        require_or_skip("gguf", is_installed("gguf"))
        from tests.tiny_gguf import write_tiny_llama

        weights = write_tiny_llama(tmp_path / "m.gguf")
        run(tmp_path / "m.gguf", tmp_path / "small")
        content = lq.verify(tmp_path / "small")
        assert len(content.matrices) == 14
        for name, array in content.tensors.items():
            np.testing.assert_array_equal(array, weights[name])

    @pytest.mark.parametrize("make", ["dense_llama", "dense_gpt2", "tied"])
    def test_a_model_of_transformers_loads_the_folder(self, tmp_path, make):
        require_or_skip("transformers", is_installed("transformers"))
        import torch

        from tests.integrations import tiny_models

        model = tiny_models.dense_gpt2() if make == "dense_gpt2" else tiny_models.dense_llama()
        if make == "tied":
            model.config.tie_word_embeddings = True
            model.tie_weights()
        model.save_pretrained(tmp_path / "dense")
        run(tmp_path / "dense", tmp_path / "small", tiny_models.FORMAT, max_iter=100)
        expected = copy.deepcopy(model)
        lq.nn.quantize_model(expected, tiny_models.FORMAT, rank=4, progress=False)
        with torch.device("meta"):
            loaded = type(model)(model.config)
        lq.nn.load_model(tmp_path / "small", loaded)
        tokens = tiny_models.tokens()
        assert torch.equal(loaded.eval()(tokens).logits, expected(tokens).logits)


class StoppedError(Exception):
    pass


class TestInterruptions:
    @pytest.mark.parametrize("after", range(1, 7))
    def test_a_run_continues_to_the_same_bytes(self, source, tmp_path, after, caplog):
        folder, target = source[0], tmp_path / "small"
        run(folder, tmp_path / "whole")

        def stop(done, total):
            if done == after:
                raise StoppedError

        with ThreadPoolExecutor(1) as one, pytest.raises(StoppedError):
            run(folder, target, progress=stop, executor=one)
        with pytest.raises(CheckpointError, match="not a complete checkpoint"):
            lq.load(target)
        seen = []
        with caplog.at_level("INFO", logger="lqlora"):
            run(folder, target, progress=lambda *numbers: seen.append(numbers))
        computed = [record.args[0] for record in caplog.records]
        assert len(computed) == len(set(computed)) == 6 - after
        assert seen == [(done, 6) for done in range(after + 1, 7)]
        assert files_of(target) == files_of(tmp_path / "whole")

    def test_an_error_at_the_first_matrix_leaves_nothing(self, source, tmp_path):
        target = tmp_path / "small"
        for _ in range(2):
            with pytest.raises(InvalidArgumentError, match="max_iter"):
                run(source[0], target, max_iter=0)
            assert not target.exists()
            target.mkdir()
            with pytest.raises(InvalidArgumentError, match="max_iter"):
                run(source[0], target, max_iter=-1)
            assert list(target.iterdir()) == []
            target.rmdir()

    def test_a_folder_that_was_begun_without_a_matrix_takes_other_settings(self, source, tmp_path):
        target = tmp_path / "small"
        (target / "unfinished").mkdir(parents=True)
        (target / "unfinished" / "run.json").write_text('{"rank": 99}')
        run(source[0], target)
        lq.verify(target)

    def test_a_folder_without_its_settings_is_refused(self, source, tmp_path):
        folder, target = source[0], tmp_path / "small"
        with ThreadPoolExecutor(1) as one, pytest.raises(StoppedError):
            run(folder, target, progress=_stop, executor=one)
        (target / "unfinished" / "run.json").unlink()
        with pytest.raises(CheckpointError, match="no unfinished checkpoint"):
            run(folder, target)

    def test_a_complete_folder_is_not_written_again(self, source, tmp_path):
        first = run(source[0], tmp_path / "small")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "small").iterdir()}
        assert run(source[0], tmp_path / "small", progress=lambda *_: pytest.fail("nothing is left to do")) == first
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "small").iterdir()} == before

    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"rank": 5}, "formats or ranks"),
            ({"max_iter": 4}, "another max_iter: 3 and not 4"),
            ({"factor_dtype": "float16"}, "factor_dtype"),
            ({"seed": 1}, "seed"),
            ({"shard_bytes": 5000}, "shard_bytes"),
            ({"fit": "scale"}, "fit"),
            ({"exclude": "*.down"}, "other matrices"),
        ],
        ids=lambda own: str(own) if isinstance(own, dict) else "",
    )
    @pytest.mark.parametrize("is_complete", [True, False])
    def test_other_settings_are_named(self, source, tmp_path, options, name, is_complete):
        folder, target = source[0], tmp_path / "small"
        if is_complete:
            run(folder, target)
        else:
            with pytest.raises(StoppedError):
                run(folder, target, progress=_stop)
        before = files_of(target)
        with pytest.raises(CheckpointError, match=name):
            run(folder, target, **options)
        assert files_of(target) == before

    def test_other_settings_are_named_when_no_file_has_its_name(self, source, tmp_path):
        folder, target = source[0], tmp_path / "small"

        def stop(done, total):
            if list(target.glob("*.safetensors")):
                raise StoppedError

        with ThreadPoolExecutor(1) as one, pytest.raises(StoppedError):
            run(folder, target, progress=stop, executor=one)
        for path in (target / "unfinished").rglob("*.safetensors"):
            path.unlink()
        before = files_of(target)
        with pytest.raises(CheckpointError, match="another shard_bytes"):
            run(folder, target, shard_bytes=2**20)
        assert files_of(target) == before

    def test_another_source_or_norm_is_named(self, source, tmp_path):
        folder, tensors = source
        target = tmp_path / "small"
        with ThreadPoolExecutor(1) as one, pytest.raises(StoppedError):
            run(folder, target, progress=_stop, executor=one)
        [first] = lq.load(next((target / "unfinished").rglob("*.safetensors"))).matrices
        size = tensors[f"{first}.weight"].shape[1]
        norm = lq.weighting.InputGram(np.cov(values((100, size)), rowvar=False))
        with pytest.raises(CheckpointError, match="another norm"):
            run(folder, target, weighting={first: norm})
        for path in folder.glob("*.safetensors"):
            changed = load_file(path)
            if f"{first}.weight" in changed:
                changed[f"{first}.weight"][0, 0] += 1
                save_file(changed, path)
        with pytest.raises(CheckpointError, match=rf"other values in '{first}'"):
            run(folder, target)

    def test_a_bad_weight_keeps_what_is_finished(self, source, tmp_path):
        folder, target = source[0], tmp_path / "small"
        path = folder / "model-00002-of-00002.safetensors"
        good = load_file(path)
        bad = {name: own.copy() for name, own in good.items()}
        name = next(own for own in bad if own.endswith("up.weight"))
        bad[name][3, 5] = np.nan
        save_file(bad, path)
        with ThreadPoolExecutor(1) as one, pytest.raises(NonFiniteError, match=re.escape(name.removesuffix(".weight"))):
            run(folder, target, executor=one)
        save_file(good, path)
        seen = []
        run(folder, target, progress=lambda *numbers: seen.append(numbers))
        assert len(seen) < 6
        assert lq.verify(target).matrices

    @pytest.mark.parametrize("change", ["cut", "bit", "another"])
    def test_a_damaged_file_of_a_finished_matrix_is_made_again(self, source, tmp_path, change, caplog):
        folder, target = source[0], tmp_path / "small"
        options = {"shard_bytes": 2**20}
        run(folder, tmp_path / "whole", **options)

        def stop(done, total):
            if done == 2:
                raise StoppedError

        with ThreadPoolExecutor(1) as one, pytest.raises(StoppedError):
            run(folder, target, progress=stop, executor=one, **options)
        first, second = sorted((target / "unfinished").rglob("*.safetensors"))
        data = bytearray(first.read_bytes())
        data[-1] ^= 1
        first.write_bytes({"cut": data[:-1], "bit": data, "another": second.read_bytes()}[change])
        run(folder, target, **options)
        assert first.name in caplog.text
        assert files_of(target) == files_of(tmp_path / "whole")

    def test_a_damaged_or_foreign_file_of_the_checkpoint_is_named(self, source, tmp_path):
        folder, target = source[0], tmp_path / "small"
        run(folder, tmp_path / "other", fit="scale")
        name = sorted(path.name for path in (tmp_path / "other").glob("*.safetensors"))[1]
        run(folder, target)
        good = (target / name).read_bytes()
        (target / name).write_bytes((tmp_path / "other" / name).read_bytes())
        with pytest.raises(CheckpointError, match=r"lqlora\.json does not list"):
            run(folder, target)
        (target / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=name):
            run(folder, target)
        lq.save(target / name, {}, {"evil": np.ones(3, np.float32)}, {"matrices": {}, "tensors": {"evil": "x"}})
        with pytest.raises(CheckpointError, match="the file of this checkpoint"):
            run(folder, target)
        lq.save(target / name, {}, {"evil": np.ones(3, np.float32)}, {"matrices": {"m": 5}})
        with pytest.raises(CheckpointError, match="matrices"):
            run(folder, target)

    @pytest.mark.parametrize("is_complete", [True, False])
    def test_other_values_of_a_copied_tensor_are_named(self, source, tmp_path, is_complete):
        folder, _ = source
        target = tmp_path / "small"
        if is_complete:
            run(folder, target)
        else:
            with ThreadPoolExecutor(1) as one, pytest.raises(StoppedError):
                run(folder, target, progress=_stop, executor=one, shard_bytes=2600)
        path = folder / "model-00001-of-00002.safetensors"
        changed = load_file(path)
        assert "kernel" in changed
        save_file(changed | {"kernel": changed["kernel"] * 7}, path)
        with pytest.raises(CheckpointError, match="other values in 'kernel'"):
            run(folder, target, **({} if is_complete else {"shard_bytes": 2600}))

    def test_a_complete_folder_of_another_source_is_refused(self, source, tmp_path):
        folder, _ = source
        run(folder, tmp_path / "small")
        path = folder / "model-00001-of-00002.safetensors"
        changed = load_file(path)
        save_file(changed | {"model.layers.0.down.weight": changed["model.layers.0.down.weight"] * 2}, path)
        with pytest.raises(CheckpointError, match=r"other values in 'model\.layers\.0\.down'"):
            run(folder, tmp_path / "small")


def _stop(done, total):
    raise StoppedError


class TestRefusals:
    def test_a_folder_with_something_else_is_not_touched(self, source, tmp_path):
        target = tmp_path / "small"
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")
        with pytest.raises(CheckpointError, match="not empty"):
            run(source[0], target)
        assert files_of(target) == {"thesis.txt": b"years of work"}
        (tmp_path / "file").write_text("x")
        with pytest.raises(CheckpointError, match="not a folder"):
            run(source[0], tmp_path / "file")

    def test_a_folder_with_a_subfolder_of_that_name_is_not_touched(self, source, tmp_path):
        target = tmp_path / "mine"
        (target / "unfinished" / "job.partial").mkdir(parents=True)
        (target / "unfinished" / "job.partial" / "precious").write_text("x")
        (target / "unfinished" / "lock").write_text("mine")
        before = files_of(target)
        with pytest.raises(CheckpointError, match="no unfinished checkpoint"):
            run(source[0], target)
        (target / "config.json").write_text("my own")
        with pytest.raises(CheckpointError, match="no unfinished checkpoint"):
            run(source[0], target)
        (target / "config.json").unlink()
        assert files_of(target) == before

    def test_files_of_others_beside_the_work_stay(self, source, tmp_path):
        folder, target = source[0], tmp_path / "small"
        with ThreadPoolExecutor(1) as one, pytest.raises(StoppedError):
            run(folder, target, progress=_stop, executor=one)
        for path in (
            target / "notes.txt",
            target / "unfinished" / "notes.txt",
            target / "unfinished" / "a.partial" / "b",
        ):
            path.parent.mkdir(exist_ok=True)
            path.write_text("mine")
        run(folder, target)
        assert (target / "notes.txt").read_text() == (target / "unfinished" / "notes.txt").read_text() == "mine"
        assert (target / "unfinished" / "a.partial" / "b").read_text() == "mine"
        lq.verify(target)

    @pytest.mark.parametrize(
        "name",
        ["model.layers.0.up.quantized.codes", "model.layers.0.up.lora_A", "x.quantized.quantized.y", "n" * 70_000],
    )
    def test_a_reserved_name_is_found_before_the_work(self, source, tmp_path, name):
        folder, _ = source
        matrix = {"x.quantized.weight": values((32, 16))} if name.startswith("x") else {}
        dtype = np.int32 if "lora" in name else np.float32  # floating-point factors are those of an adapter
        save_file(matrix | {name: np.ones(3, dtype)}, folder / "model-00003-of-00002.safetensors")
        (folder / "model-00003-of-00002.safetensors").rename(folder / "more.safetensors")
        with pytest.raises(CheckpointError, match=r"reserved|70000 characters"):
            run(folder, tmp_path / "small", dry_run=True)

    def test_a_matrix_and_a_tensor_may_have_one_name(self, tmp_path):
        save_file({"a.weight": values((32, 32)), "a": np.ones(3, np.float32)}, tmp_path / "m.safetensors")
        for shard_bytes in (1, 2**20):
            run(tmp_path / "m.safetensors", tmp_path / str(shard_bytes), shard_bytes=shard_bytes)
            content = lq.verify(tmp_path / str(shard_bytes))
            assert (list(content.matrices), list(content.tensors)) == (["a"], ["a"])

    def test_the_folder_of_the_source_is_refused(self, source, tmp_path):
        before = files_of(tmp_path)
        for target in (source[0], tmp_path):
            with pytest.raises(CheckpointError, match="that is read"):
                run(source[0], target)
        assert files_of(tmp_path) == before

    def test_two_writers_at_once(self, source, tmp_path):
        target, found = tmp_path / "small", []

        def again(done, total):
            if done == 1:
                with pytest.raises(CheckpointError, match="in use") as caught:
                    run(source[0], target)
                found.append(caught)

        run(source[0], target, progress=again)
        assert len(found) == 1
        lq.verify(target)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"rank": None}, "rank must be given"),
            ({"rank": -1}, "rank"),
            ({"rank": {"*.up": 2}}, r"rank must be given.*down"),
            ({"rank": {"nowhere": 2}}, "rank.*nowhere"),
            ({"formats": {}}, "formats must be"),
            ({"formats": {"nowhere": FORMAT}}, "nowhere"),
            ({"formats": "nf3/64"}, "formats must be"),
            ({"formats": lambda _: None}, "BlockFormat"),
            ({"include": "nowhere"}, "include.*nowhere"),
            ({"factor_dtype": "int8"}, "factor_dtype"),
            ({"shard_bytes": 0}, "shard_bytes"),
            ({"callback": print}, "callback cannot be set"),
            ({"time_limit": 1.0}, "time_limit cannot be set"),
            ({"quantizer": print}, "quantizer must be text"),
            ({"foo": 1}, "foo cannot be set"),
            ({"scaling": math.inf}, "scaling"),
            ({"fit": "absmx"}, "fit"),
            ({"quantizer": "gptq"}, r"weighting must have a norm.*model\.layers"),
            ({"weighting": {"model.layers.0.up": 3}}, r"weighting must give.*3"),
            ({"weighting": 3}, "weighting must be a mapping"),
            ({"exclude": "typo"}, "exclude must match.*typo"),
            ({"include": ["*.up", "typo"]}, "include must match.*typo"),
            ({"include": "embed_tokens"}, "nothing is left"),
        ],
        ids=[
            "no rank", "negative rank", "some ranks", "rank of nothing", "no formats", "formats of nothing", "text", "function",
            "nothing included", "dtype", "bytes", "callback", "time limit", "quantizer", "unknown", "infinite", "fit", "no norm",
            "no weighting", "norms", "exclude", "one of two", "dense by default",
        ],
    )  # fmt: skip
    def test_a_bad_argument_changes_nothing(self, source, tmp_path, options, match):
        with pytest.raises(InvalidArgumentError, match=match):
            run(source[0], tmp_path / "small", **options)
        assert not (tmp_path / "small").exists()

    def test_a_plan_of_another_model_is_refused(self, source, tmp_path):
        save_file({"model.layers.0.up": values((16, 16))}, tmp_path / "m.safetensors")
        table = lq.cost_table(open_model(tmp_path / "m.safetensors").weights, [FORMAT], rank=2, progress=False)
        with pytest.raises(InvalidArgumentError, match=r"plan of this model.*\(48, 32\).*\(16, 16\)"):
            run(source[0], tmp_path / "small", lq.allocate(table, bits_per_weight=8), rank=None)


class TestFolders:
    @pytest.fixture
    def small(self, source, tmp_path):
        run(source[0], tmp_path / "small")
        return tmp_path / "small"

    def refusal(self, folder, read=lq.load):
        with pytest.raises(CheckpointError) as caught:
            read(folder)
        message = str(caught.value)
        assert len(message) <= 400
        assert message.isprintable()
        return message

    def test_mapped_arrays_are_the_same(self, small):
        read, mapped = lq.load(small), lq.load(small, mapped=True)
        for name, own in read.matrices.items():
            assert own.lora_A.tobytes() == mapped.matrices[name].lora_A.tobytes()

    def test_a_missing_or_foreign_shard_is_named(self, small, source, tmp_path):
        name = "model-00002-of-"
        path = next(own for own in small.iterdir() if own.name.startswith(name))
        data = path.read_bytes()
        path.unlink()
        assert path.name in self.refusal(small)
        run(source[0], tmp_path / "other", seed=3, fit="scale")
        path.write_bytes((tmp_path / "other" / path.name).read_bytes())
        assert path.name in self.refusal(small)
        path.write_bytes(data)
        lq.verify(small)

    def test_a_changed_byte_is_found_by_verify(self, small):
        path = next(own for own in small.iterdir() if own.name.startswith("model-00001-of-"))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert "changed" in self.refusal(small, lq.verify)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda own: own.replace('"spec": 1', '"spec": 9'), "spec"),
            (lambda own: own.replace('"run"', '"sun"'), "sha256"),
            (lambda own: own.replace("model-00001", "../odel-00001"), "sha256"),
            (lambda own: own[:-3], "JSON"),
            (lambda _: "[]", "lqlora.json"),
            (lambda _: '{"spec": 1, "shards": 5, "metadata": {}, "sha256": ""}', "shards"),
            (lambda _: "9" * 5000, "lqlora.json"),
            (lambda _: '{"spec": 1e999}', "spec"),
        ],
        ids=["version", "key", "path", "cut", "list", "types", "digits", "infinity"],
    )
    def test_a_changed_document_is_named(self, small, change, match):
        path = small / "lqlora.json"
        path.write_text(change(path.read_text()))
        assert match in self.refusal(small)

    def test_another_description_for_transformers_is_found_by_verify(self, small):
        path = small / "config.json"
        config = json.loads(path.read_text())
        for change in ({"scaling": 0.25}, {"format": "nf4/16:float32"}, {"matrices": ["model.layers.0.up"]}):
            own = copy.deepcopy(config)
            own["quantization_config"]["groups"][0] |= change
            path.write_text(json.dumps(own))
            assert "config.json" in self.refusal(small, lq.verify)
        del config["quantization_config"]
        path.write_text(json.dumps(config))
        assert "config.json" in self.refusal(small, lq.verify)

    @pytest.mark.parametrize("text", ["[1]", "no JSON", "[" * 100_000])
    def test_a_configuration_of_another_program_is_copied(self, source, tmp_path, text):
        (source[0] / "config.json").write_text(text)
        run(source[0], tmp_path / "small")
        assert (tmp_path / "small" / "config.json").read_text() == text
        lq.verify(tmp_path / "small")

    def test_a_small_file_that_is_missing_comes_back(self, small, source):
        before = files_of(small)
        for name in ("config.json", "tokenizer.json"):
            (small / name).unlink()
        run(source[0], small)
        assert files_of(small) == before

    def test_an_index_of_other_tensors_is_found_by_verify(self, small):
        path = small / "model.safetensors.index.json"
        for text in ("{", "[]", '{"weight_map": {}}'):
            path.write_text(text)
            lq.load(small)
            assert path.name in self.refusal(small, lq.verify)
        path.unlink()
        lq.verify(small)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 40)), min_size=1, max_size=4),
    text=st.sampled_from(["nf2/7:float32", "affine3/16:u4/8:float32", "tcq1/8:float32", "nf4/64:bfloat16"]),
    rank=st.integers(0, 24),
    shard=st.integers(1, 5000),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None, max_examples=25
)
def test_any_shapes_sizes_and_shards(tmp_path_factory, shapes, text, rank, shard, dtype):
    folder = tmp_path_factory.mktemp("any")
    tensors = {f"m{number}.weight": values(shape, number) for number, shape in enumerate(shapes)}
    save_file(tensors | {"bias": values((3,))}, folder / "m.safetensors")
    fmt = lq.BlockFormat.parse(text)
    options = {"rank": rank, "shard_bytes": shard, "factor_dtype": dtype, "max_iter": 2}
    planned = run(folder / "m.safetensors", folder / "small", fmt, dry_run=True, **options)
    report = run(folder / "m.safetensors", folder / "small", fmt, **options)
    content = lq.verify(folder / "small")
    assert planned.total_bytes == report.total_bytes
    for name, own in content.matrices.items():
        assert own.quantized.shape == tensors[f"{name}.weight"].shape
        assert len(own.lora_A) == min(rank, *own.quantized.shape)
        matrix = tensors[f"{name}.weight"]
        dense = lq.dequantize(own.quantized) + own.lora_B.astype(np.float32) @ own.lora_A.astype(np.float32)
        assert report.matrices[name].relative_error == pytest.approx(
            lq.relative_error(matrix, dense), rel=1e-5, abs=1e-6
        )
