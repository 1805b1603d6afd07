"""What differs between the flavours, by stand-ins that record what they are asked: TensorRT itself needs a GPU."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from deploycnn.engines import device, flavour, timing_cache
from deploycnn.engines.device import Gpu
from deploycnn.engines.flavour import Flavour
from deploycnn.engines.log import Log, listening, make_logger
from deploycnn.errors import ArtifactError, RuntimeUnavailable

GPU = Gpu(name="NVIDIA H100", capability=(9, 0), driver_cuda="13.0")


class BuilderFlag(IntEnum):
    TF32 = 7
    VERSION_COMPATIBLE = 13


class HardwareCompatibilityLevel(IntEnum):
    NONE = 0
    AMPERE_PLUS = 1
    SAME_COMPUTE_CAPABILITY = 2


class Cache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"+new"


class Config:
    """Records; refuses a timing cache that begins with "foreign"."""

    def __init__(self) -> None:
        self.flags: set[int] = set()
        self.cache: Cache | None = None
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE

    def set_flag(self, flag: int) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: int) -> None:
        self.flags.discard(flag)

    def create_timing_cache(self, content: bytes) -> Cache:
        return Cache(content)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        if cache.content.startswith(b"foreign"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache | None:
        return self.cache


def tensorrt(version: str = "11.4.0.106") -> Flavour:
    module: Any = ModuleType("tensorrt")
    module.BuilderFlag = BuilderFlag
    module.HardwareCompatibilityLevel = HardwareCompatibilityLevel
    return Flavour("tensorrt", module, version)


def test_tensorrt_keeps_timings_between_builds() -> None:
    config = Config()
    assert tensorrt().attach_timing_cache(config, b"old")
    assert tensorrt().timing_cache(config) == b"old+new"


def test_timings_of_another_gpu_are_dropped() -> None:
    config = Config()
    assert tensorrt().attach_timing_cache(config, b"foreign")
    assert tensorrt().timing_cache(config) == b"+new"


def test_rtx_times_nothing(rtx: Flavour) -> None:
    config = Config()
    assert not rtx.attach_timing_cache(config, b"old")
    assert config.cache is None
    assert rtx.timing_cache(config) is None
    assert timing_cache.path(rtx, GPU) is None


def test_timings_are_kept_by_gpu_driver_and_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEPLOYCNN_CACHE", str(tmp_path))
    paths = {
        timing_cache.path(tensorrt(version), gpu)
        for version in ("11.4.0.106", "10.16.1.11")
        for gpu in (GPU, Gpu(name="NVIDIA H200", capability=(9, 0), driver_cuda="13.0"))
    }
    assert len(paths) == 4
    assert all(path is not None and path.is_relative_to(tmp_path) for path in paths)
    assert timing_cache.path(tensorrt(), None) is None


def test_compatibility_of_tensorrt() -> None:
    config = Config()
    tensorrt().set_compatibility(config, hardware="ampere_plus", version=True)
    assert config.hardware_compatibility_level == HardwareCompatibilityLevel.AMPERE_PLUS
    assert config.flags == {BuilderFlag.VERSION_COMPATIBLE}


def test_tf32_is_allowed_or_not() -> None:
    config = Config()
    tensorrt().set_tf32(config, True)
    assert config.flags == {BuilderFlag.TF32}
    tensorrt().set_tf32(config, False)
    assert config.flags == set()


def test_tensorrt_builds_for_the_gpu_at_hand_only() -> None:
    tensorrt().set_capabilities(Config(), ())
    assert tensorrt().capabilities == ()
    with pytest.raises(RuntimeUnavailable, match="builds for the GPU at hand"):
        tensorrt().set_capabilities(Config(), ("8.6",))


def test_a_flag_that_is_gone_is_named() -> None:
    with pytest.raises(RuntimeUnavailable, match=r"tensorrt 11.4.0.106 has no builder flag FP16"):
        tensorrt().flag("FP16")


def test_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavour, "installed", lambda name: name == "tensorrt")
    monkeypatch.setattr(flavour, "require", lambda _: SimpleNamespace(__version__="8.6.1"))
    flavour.find.cache_clear()
    with pytest.raises(RuntimeUnavailable, match="tensorrt 8.6.1 is too old"):
        flavour.find("tensorrt")
    flavour.find.cache_clear()


def test_what_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavour, "DISTRIBUTIONS", {"tensorrt": ("no-such-distribution",)})
    with pytest.raises(RuntimeUnavailable, match=r'pip install "deploycnn\[tensorrt\]"'):
        flavour.version_of("tensorrt")


def test_rtx_contexts_take_a_runtime_cache_and_give_it_back() -> None:
    asked: dict[str, Any] = {}
    cache = SimpleNamespace(
        deserialize=lambda content: asked.update(content=content), serialize=lambda: b"compiled"
    )
    config = SimpleNamespace(
        create_runtime_cache=lambda: cache, set_runtime_cache=lambda given: asked.update(cache=given)
    )
    engine = SimpleNamespace(
        create_runtime_config=lambda: config, create_execution_context=lambda given: ("context", given)
    )
    module: Any = ModuleType("tensorrt_rtx")
    module.CudaGraphStrategy = SimpleNamespace(DISABLED="off", WHOLE_GRAPH_CAPTURE="whole")
    rtx = Flavour("tensorrt-rtx", module, "1.7")
    context, read = rtx.context(engine, runtime_cache=b"old", cuda_graphs=True)
    assert context == ("context", config)
    assert asked == {"content": b"old", "cache": cache}
    assert config.cuda_graph_strategy == "whole"
    assert read() == b"compiled"


def test_a_context_that_does_not_fit_into_memory_says_so() -> None:
    engine = SimpleNamespace(create_execution_context=lambda: None)
    with pytest.raises(ArtifactError, match=r"out of device memory.*max_batch"):
        tensorrt().context(engine)


def test_messages_go_to_whoever_listens() -> None:
    logger = make_logger(SimpleNamespace(ILogger=type("ILogger", (), {})))
    with listening() as outer:
        logger.log(3, "one")
        with listening(Log()) as inner:
            logger.log(1, "two\n")
        logger.log(2, "three")
    logger.log(1, "nobody hears this")
    assert outer.records == [("INFO", "one"), ("ERROR", "two"), ("WARNING", "three")]
    assert (inner.errors(), outer.warnings()) == (["two"], ["three"])
    assert outer.text("WARNING") == "ERROR: two\nWARNING: three\n"


class Driver:
    """A CUDA driver with one device, or one that fails."""

    def __init__(self, *, fails: int = 0, count: int = 1) -> None:
        self.fails, self.count = fails, count

    def cuInit(self, _: int) -> int:  # noqa: N802
        return self.fails

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device: Any, _: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetName(self, name: Any, _: int, __: Any) -> int:  # noqa: N802
        name.value = b"Card"
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 12080
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, _: Any) -> int:  # noqa: N802
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0


def test_the_driver_tells_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_driver", Driver)
    assert device.require_gpu() == Gpu(name="Card", capability=(8, 9), driver_cuda="12.8")
    assert device.require_gpu().sm == "sm_89"


@pytest.mark.parametrize(
    ("driver", "why"),
    [
        (None, "no NVIDIA driver"),
        (Driver(fails=999), "answers cuInit with error 999"),
        (Driver(count=0), "sees no GPU"),
    ],
)
def test_no_gpu_says_why(driver: Driver | None, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_driver", lambda: driver)
    with pytest.raises(RuntimeUnavailable, match=why):
        device.require_gpu()
    assert device.current_gpu() is None


@pytest.mark.parametrize("make", ["builder", "runtime"])
def test_a_library_that_cannot_start_is_one_error(make: str) -> None:
    """What pybind11 raises where the library's own factory returns nothing, as with a driver too old for it."""

    def fail(_: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    module: Any = SimpleNamespace(Runtime=fail, Builder=fail)
    found = Broken("tensorrt", module, "11.4")
    with pytest.raises(RuntimeUnavailable, match="cannot start: the driver is too old"):
        getattr(found, make)()


class Broken(Flavour):
    """With no logger of a library's own."""

    __slots__ = ()

    @property
    def logger(self) -> object:
        return None
