from tests.engines.conftest import rtx
from tests.gpu.fixtures import device, driver, gpu
from tests.gpu.on_gpu import here, plain_trt, real_device, real_rtx, real_trt, trt

__all__ = [
    "device",
    "driver",
    "gpu",
    "here",
    "plain_trt",
    "real_device",
    "real_rtx",
    "real_trt",
    "rtx",
    "trt",
]
