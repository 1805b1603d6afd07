"""Every name of TensorRT that this package or ``gpu`` uses; a test holds them against those that each flavour has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Name = Literal["tensorrt", "tensorrt-rtx"]

#: Modules of each flavour, in order of preference.
MODULES: Mapping[Name, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}

#: Distributions that bring them.
DISTRIBUTIONS: Mapping[Name, tuple[str, ...]] = {
    "tensorrt": (
        "tensorrt",
        "tensorrt-cu13",
        "tensorrt-cu12",
        "tensorrt-cu13-bindings",
        "tensorrt-cu12-bindings",
    ),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
}

#: Class -> members that are used of it, in every flavour ("" is the module itself).
USED: Mapping[str, tuple[str, ...]] = {
    "ILogger": ("log",),
    "Builder": ("build_serialized_network", "create_builder_config", "create_network", "create_optimization_profile"),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "INetworkDefinition": ("get_input", "get_output", "num_inputs", "num_outputs", "num_layers"),
    "ITensor": ("dtype", "name", "shape"),
    "OnnxParser": ("get_error", "num_errors", "parse"),
    "ParserError": ("code", "desc", "node_name", "node_operator"),
    "IBuilderConfig": (
        "add_optimization_profile", "builder_optimization_level", "profiling_verbosity", "progress_monitor",
        "clear_flag", "set_flag", "set_memory_pool_limit",
    ),
    "IOptimizationProfile": ("set_shape",),
    "IProfiler": ("report_layer_time",),
    "IExecutionContext": (
        "execute_async_v3", "get_tensor_shape", "profiler", "set_input_shape", "set_optimization_profile_async",
        "set_tensor_address",
    ),
    "IProgressMonitor": ("phase_finish", "phase_start", "step_complete"),
    "MemoryPoolType": ("WORKSPACE",),
    "ProfilingVerbosity": ("DETAILED", "LAYER_NAMES_ONLY", "NONE"),
    "BuilderFlag": ("REFIT", "SPARSE_WEIGHTS", "STRIP_PLAN", "TF32"),
    "Runtime": ("deserialize_cuda_engine", "engine_host_code_allowed"),
    "ICudaEngine": (
        "create_engine_inspector", "create_execution_context", "get_tensor_dtype", "get_tensor_mode",
        "get_tensor_name", "get_tensor_profile_shape", "get_tensor_shape", "num_io_tensors",
        "num_optimization_profiles", "serialize",
    ),
    "EngineInspector": ("execution_context", "get_engine_information"),
    "LayerInformationFormat": ("JSON",),
    "TensorIOMode": ("INPUT",),
    "DataType": ("BF16", "BOOL", "FLOAT", "FP8", "HALF", "INT32", "INT4", "INT64", "INT8", "UINT8"),
    "Refitter": ("get_missing_weights", "refit_cuda_engine"),
    "OnnxParserRefitter": ("refit_from_bytes",),
}  # fmt: skip

#: What only ``tensorrt`` 10 and 11 are asked for.
USED_TENSORRT: Mapping[str, tuple[str, ...]] = {
    "BuilderFlag": ("EXCLUDE_LEAN_RUNTIME", "VERSION_COMPATIBLE"),
    "HardwareCompatibilityLevel": ("AMPERE_PLUS", "NONE", "SAME_COMPUTE_CAPABILITY"),
    "IBuilderConfig": (
        "create_timing_cache",
        "get_timing_cache",
        "hardware_compatibility_level",
        "set_timing_cache",
    ),
    "ITimingCache": ("serialize",),
}

#: What only TensorRT-RTX is asked for.
USED_RTX: Mapping[str, tuple[str, ...]] = {
    "ComputeCapability": ("CURRENT", "SM75", "SM80", "SM86", "SM89", "SM120", "SM121"),
    "CudaGraphStrategy": ("DISABLED", "WHOLE_GRAPH_CAPTURE"),
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
    "ICudaEngine": ("create_runtime_config",),
    "IRuntimeCache": ("deserialize", "serialize"),
    "IRuntimeConfig": ("create_runtime_cache", "cuda_graph_strategy", "set_runtime_cache"),
}
