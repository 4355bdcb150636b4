"""Choosing a backend: automatic, by argument, by use_backend, by environment; absent ones; the one warning."""

import asyncio
import re
import threading
import types
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ioubal_kernels as ik
from ioubal_kernels import backends, ops, testing
from ioubal_kernels.ops import with_triton


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("IOUBAL_BACKEND", raising=False)
    for name, value in (("_chosen", {}), ("_warned", set()), ("_pending", []), ("_process_choice", None)):
        monkeypatch.setattr(backends, name, value)
    yield


@pytest.fixture
def without_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "load_error", lambda backend: f"the {backend} library file is missing")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def chosen(backend: str | None = None, device: str = "cpu", float64: bool = False) -> str:
    return backends.choose("op", backend, torch.device(device), float64).__name__.rpartition(".")[2]


def call(**options) -> torch.Tensor:
    c = testing.classification_inputs(0)
    return ik.iou_balanced_sigmoid_focal_loss(c.logits, c.labels, c.iou, **options)


def test_reference_is_always_available() -> None:
    assert ik.available_backends()[-1] == "reference"
    assert chosen("reference") == "reference"
    assert backends.unavailable_reason("reference") is None


def test_automatic_choice_falls_back_with_one_warning(without_cpu: None) -> None:
    with pytest.warns(RuntimeWarning) as caught:
        call()
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "the cpu library file is missing" in message
    assert message.count("pip install --no-build-isolation .") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
        call(backend="reference")
    assert chosen() == "reference"
    assert ik.available_backends() == ["reference"]


def test_no_warning_where_nothing_is_absent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(device="meta") == "reference"
        assert chosen("reference") == "reference"


def test_absent_backend_by_name(without_cpu: None) -> None:
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available: the cpu library file is missing"):
        call(backend="cpu")
    with pytest.raises(RuntimeError, match="use_backend: backend 'cpu' is not available"):
        ik.use_backend("cpu")


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_no_float64_on_a_gpu_but_in_the_reference(name: str) -> None:
    with pytest.raises(TypeError, match="has no float64"):
        backends.choose("op", name, torch.device("cuda"), True)
    assert chosen(device="cuda", float64=True) == "reference"


TRITON_CASES = {
    "no CUDA build": (None, True, (9, 0), "gcc", None, "is not a CUDA build; install one that is"),
    "no GPU": ("13.0", False, (9, 0), "gcc", None, "no GPU usable here"),
    "old GPU": ("13.0", True, (7, 5), "gcc", None, "the GPU's compute capability is 7.5, the kernels need 8.0"),
    "no compiler": ("13.0", True, (9, 0), None, None, "triton needs a C compiler"),
    "not installed": ("13.0", True, (9, 0), "gcc", "triton is not installed", "triton is not installed"),
    "usable": ("13.0", True, (9, 0), "gcc", None, None),
}


@pytest.mark.parametrize("case", TRITON_CASES)
def test_triton_backend_says_what_is_missing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version, gpu, capability, compiler, broken, words = TRITON_CASES[case]
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(with_triton.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(with_triton, "_import_reason", lambda: broken)
    monkeypatch.setattr(ops, "load_error", lambda backend: "not built")
    assert ("triton" in ik.available_backends()) == (words is None)
    if words is None:  # without the CUDA library it is the automatic choice
        assert chosen(device="cuda") == chosen("triton", "cuda") == "with_triton"
        monkeypatch.setattr(ops, "load_error", lambda backend: None)
        backends._chosen.clear()
        assert chosen(device="cuda") == "ops"
        return
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: .*" + re.escape(words)):
        chosen("triton", "cuda")


@pytest.mark.parametrize("error", (ImportError("no libtriton"), OSError("bad file"), AttributeError("half of it")))
def test_a_broken_triton_breaks_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise error

    monkeypatch.setattr(with_triton.importlib, "import_module", broken)
    monkeypatch.setattr(with_triton.importlib.util, "find_spec", lambda name: object())
    reason = with_triton._import_reason.__wrapped__()
    assert type(error).__name__ in reason and str(error) in reason and "reinstall" in reason


def test_an_old_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(with_triton.importlib, "import_module", lambda name: types.SimpleNamespace(__version__="3.5.1"))
    monkeypatch.setattr(with_triton.importlib.util, "find_spec", lambda name: object())
    assert "triton 3.5.1 is too old" in with_triton._import_reason.__wrapped__()


def test_triton_takes_no_cpu_tensors() -> None:
    with pytest.raises(ValueError, match="'triton' takes cuda tensors, got tensors on cpu"):
        chosen("triton", "cpu")


def test_a_library_for_other_gpus_makes_way_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(with_triton.shutil, "which", lambda name: "gcc")
    monkeypatch.setattr(with_triton, "_import_reason", lambda: None)
    monkeypatch.setattr(ops, "load_error", lambda backend: None)
    for architectures, expected in ((["sm_90"], "with_triton"), (["sm_80", "sm_90"], "ops"), ([], "ops")):
        monkeypatch.setattr(ops.library, "build_info", lambda a=architectures: {"cuda": {"architectures": a}})
        backends._chosen.clear()
        assert chosen(device="cuda") == expected


CUDA_CASES = {
    "no CUDA build": (None, None, (9, 0), "is not a CUDA build; install one that is"),
    "not built": ("13.0", "no nvcc found", (9, 0), "no nvcc found; build it with `pip install --no-build-isolation .`"),
    "no GPU": ("13.0", None, None, "built, but no GPU usable here"),
    "other GPU": ("13.0", None, (8, 6), "has code for sm_90 only, the GPU's compute capability is 8.6; build it with"),
    "usable": ("13.0", None, (9, 0), None),
}


@pytest.mark.parametrize("case", CUDA_CASES)
def test_cuda_backend_says_what_is_missing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name an error with the reason; automatically `reference` with one warning that has it, too."""
    version, error, gpu, words = CUDA_CASES[case]
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    monkeypatch.setattr(ops, "load_error", lambda backend: error)
    monkeypatch.setattr(ops.library, "build_info", lambda: {"cuda": {"architectures": ["sm_90"]}})
    monkeypatch.setattr(with_triton, "_import_reason", lambda: "no triton")
    assert ("cuda" in ik.available_backends()) == (words is None)
    if words is None:
        assert chosen(device="cuda") == chosen("cuda", "cuda") == "ops"
        return
    assert words in backends.unavailable_reason("cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: ") as raised:
        chosen("cuda", "cuda")
    with pytest.warns(RuntimeWarning, match="reference backend on cuda tensors") as caught:
        backends._warn_fallback("cuda", [f"cuda: {backends.unavailable_reason('cuda')}"])
    assert words in str(raised.value) and words in str(caught[0].message)
    assert chosen(device="cuda") == "reference"


def test_wrong_device_for_a_named_backend() -> None:
    with pytest.raises(ValueError, match="backend 'cpu' takes cpu tensors, got tensors on meta"):
        backends.choose("op", "cpu", torch.device("meta"), False)


def test_argument_beats_context_beats_process_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOUBAL_BACKEND", "nonsense")
    with pytest.raises(
        ValueError, match=r"backend \(chosen by use_backend or IOUBAL_BACKEND\) must be one of .*'nonsense'"
    ):
        call()
    ik.use_backend("reference")
    assert chosen() == "reference"
    monkeypatch.setenv("IOUBAL_BACKEND", "reference")
    ik.use_backend(None)
    assert chosen() == backends.choose("op", "auto", torch.device("cpu"), False).__name__.rpartition(".")[2]
    with ik.use_backend("reference"):
        assert chosen() == "reference"
        assert chosen("reference") == "reference"


def test_context_manager_restores_and_nests() -> None:
    before = chosen("auto")
    with ik.use_backend("reference"):
        assert chosen() == "reference"
        with ik.use_backend("auto"):
            assert chosen() == before
        assert chosen() == "reference"
    assert backends._context_choice.get() is None
    assert backends._process_choice is None
    with pytest.raises(KeyError), ik.use_backend("reference"):
        raise KeyError
    assert backends._context_choice.get() is None


def test_use_backend_as_a_function_holds_for_other_threads() -> None:
    ik.use_backend("reference")
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.append(chosen()))
    thread.start()
    thread.join()
    assert seen == ["reference"]


def test_context_manager_stays_in_its_thread_and_task() -> None:
    inside, leave = threading.Event(), threading.Event()

    def worker() -> None:
        with ik.use_backend("reference"):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=worker)
    thread.start()
    assert inside.wait(10)
    assert backends._override() is None
    leave.set()
    thread.join()

    async def task(name: str) -> str | None:
        with ik.use_backend(name):
            await asyncio.sleep(0)
            return backends._override()

    async def both() -> list:
        return await asyncio.gather(task("reference"), task("auto"))

    assert asyncio.run(both()) == ["reference", "auto"]


def test_decorator() -> None:
    @ik.use_backend("reference")
    def inside(fail: bool = False) -> str:
        """Its own."""
        if fail:
            raise KeyError("inside")
        return chosen()

    want = chosen()
    assert inside() == "reference" and chosen() == want != "reference" and inside.__doc__ == "Its own."
    with pytest.raises(KeyError):
        inside(True)
    assert chosen() == want


async def coroutine() -> None: ...


def generator() -> Any:
    yield


@pytest.mark.parametrize("late", [coroutine, generator, torch.nn.ReLU])
def test_decorator_of_what_runs_later(late: Any) -> None:
    with pytest.raises(TypeError, match="use_backend: function must be a plain function, whose body runs while"):
        ik.use_backend("reference")(late)


def test_w_loc_is_measured_on_the_host_whatever_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(torch.zeros(3, 4), torch.full((3, 4), 0.1))]
    want = ik.calibrate_w_loc(pairs)
    monkeypatch.setenv("IOUBAL_BACKEND", "cuda")
    assert ik.calibrate_w_loc(pairs) == want > 1


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="use_backend: name must be one of .*did you mean 'triton'"):
        ik.use_backend("tritn")
    with pytest.raises(TypeError, match="use_backend: name must be a string"):
        ik.use_backend(3)
    with pytest.raises(ValueError, match="unavailable_reason"):
        backends.unavailable_reason("gpu")


def test_check_everywhere_passes_by_what_has_no_values(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("IOUBAL_CHECK", "1")
    c = testing.classification_inputs(0)
    loss = partial(ik.iou_balanced_sigmoid_focal_loss, backend=backend)
    want = loss(c.logits, c.labels, c.iou)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")(c.logits, c.labels, c.iou)
    torch.testing.assert_close(compiled, want)
    if backend == "reference":
        assert loss(*(t.to("meta") for t in (c.logits, c.labels, c.iou))).is_meta
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert loss(*map(mode.from_tensor, (c.logits, c.labels, c.iou))).shape == ()


@pytest.mark.parametrize("mode", ["0", "1", "auto"])
def test_check_modes(mode: str, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """IOUBAL_CHECK=0: nothing is read out of bounds and the loss is NaN, also in the other rows' sum."""
    monkeypatch.setenv("IOUBAL_CHECK", mode)
    c = testing.classification_inputs(0)
    c.labels[5] = 5
    if mode == "0":
        assert ik.iou_balanced_sigmoid_focal_loss(c.logits, c.labels, c.iou, backend=backend).isnan()
        return
    with pytest.raises(ValueError, match="got 5 at labels"):
        ik.iou_balanced_sigmoid_focal_loss(c.logits, c.labels, c.iou, backend=backend)
