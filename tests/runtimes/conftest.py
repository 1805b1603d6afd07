from tests.gpu.fixtures import device, driver, gpu

__all__ = ["device", "driver", "gpu"]
