"""Machines that run a case: the emulator, always; a GPU through the CUDA driver, where there is one."""

import ctypes

import torch

from ..launch import LaunchOptions, load_ptx
from ..tensor_map import TensorMap


class EmulatorRunner:
    """Runs cases in the emulator, with every check on."""

    def __init__(self, **options):
        self.options = LaunchOptions(**options)

    def run(self, case):
        """-> {argument name: tensor after the launch}; the case's own tensors stay as they are."""
        tensors = _copies(case, torch.Tensor.clone)
        args = {name: _with_tensor(value, tensors.get(name)) for name, value in case.args.items()}
        load_ptx(case.ptx).launch(
            case.entry,
            case.grid,
            case.block,
            args,
            shared_bytes=case.shared_bytes,
            cluster=case.cluster,
            options=self.options,
        )
        return tensors


def _copies(case, copy):
    """A copy of each tensor by argument name; arguments that share a tensor share its copy."""
    by_identity = {id(tensor): copy(tensor) for tensor in case.tensors().values()}
    return {name: by_identity[id(tensor)] for name, tensor in case.tensors().items()}


def _with_tensor(value, tensor):
    if isinstance(value, TensorMap):
        return TensorMap(tensor, value.box, value.swizzle, value.shape, value.strides)
    return value if tensor is None else tensor


class CudaDevice:
    """The current CUDA device: its driver, and where tensors are for it."""

    def __init__(self):
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device")
        torch.cuda.current_stream()  # makes the context
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.capability = torch.cuda.get_device_capability()

    def upload(self, tensor):
        """A copy that kernels can read and write."""
        return tensor.cuda()

    def synchronize(self):
        """Waits for what has been launched."""
        torch.cuda.synchronize()


class CudaRunner:
    """Runs cases on a CUDA device, the current one unless another is given."""

    def __init__(self, device=None):
        """device: something with driver (its library), capability, upload and synchronize, as CudaDevice has."""
        self.device = device or CudaDevice()
        self.driver = self.device.driver

    def supports(self, case):
        """sm_90a code runs on compute capability 9.0 only, other code on its own or any later one."""
        needed = int(case.arch[3:].rstrip("a"))
        have = self.device.capability[0] * 10 + self.device.capability[1]
        return have == needed if case.arch.endswith("a") else have >= needed

    def _check(self, status, what):
        if status:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{what}: {text.value.decode() if text.value else status}")

    def run(self, case):
        """As EmulatorRunner.run."""
        tensors = _copies(case, self.device.upload)
        loaded, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self.driver.cuModuleLoadData(ctypes.byref(loaded), case.ptx.encode()), "cuModuleLoadData")
        try:
            self._check(
                self.driver.cuModuleGetFunction(ctypes.byref(function), loaded, case.entry.encode()),
                "cuModuleGetFunction",
            )
            self._check(
                self.driver.cuFuncSetAttribute(function, 8, ctypes.c_int(case.shared_bytes)), "dynamic shared memory"
            )
            self._launch(
                function, case, [self._argument(value, tensors.get(name)) for name, value in case.args.items()]
            )
            self.device.synchronize()
        finally:
            self.driver.cuModuleUnload(loaded)
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def _argument(self, value, tensor):
        if isinstance(value, TensorMap):
            return self._encode(value, tensor)
        if isinstance(value, bytes):
            return (ctypes.c_uint8 * len(value)).from_buffer_copy(value)
        return ctypes.c_int(value) if tensor is None else ctypes.c_uint64(tensor.data_ptr())

    def _encode(self, value, tensor):
        """A CUtensorMap, aligned to 64 bytes."""
        storage = (ctypes.c_uint8 * 192)()
        start = -ctypes.addressof(storage) % 64
        encoded = (ctypes.c_uint8 * 128).from_buffer(storage, start)
        data_type = {torch.int32: 3, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}[tensor.dtype]
        shape, strides = tuple(tensor.shape)[::-1], tuple(tensor.stride())[::-1]
        rank = len(shape)
        sizes = (ctypes.c_uint64 * rank)(*shape)
        pitches = (ctypes.c_uint64 * max(rank - 1, 1))(*(stride * tensor.element_size() for stride in strides[1:]))
        box, steps = (ctypes.c_uint32 * rank)(*value.box[::-1]), (ctypes.c_uint32 * rank)(*[1] * rank)
        swizzle = (0, 32, 64, 128).index(value.swizzle)
        status = self.driver.cuTensorMapEncodeTiled(
            encoded, data_type, rank, ctypes.c_void_p(tensor.data_ptr()), sizes, pitches, box, steps, 0, swizzle, 0, 0
        )
        self._check(status, "cuTensorMapEncodeTiled")
        return encoded

    def _launch(self, function, case, arguments):
        class Attribute(ctypes.Structure):
            _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint32 * 16)]

        class Config(ctypes.Structure):
            _fields_ = [(name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")]
            _fields_ += [
                ("stream", ctypes.c_void_p),
                ("attributes", ctypes.POINTER(Attribute)),
                ("n_attributes", ctypes.c_uint),
            ]

        cluster = Attribute(4, 0, (ctypes.c_uint32 * 16)(*case.cluster))
        clustered = case.cluster != (1, 1, 1)
        block = case.block if isinstance(case.block, tuple) else (case.block, 1, 1)
        config = Config(*case.grid, *block, case.shared_bytes, None, ctypes.pointer(cluster), int(clustered))
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        self._check(self.driver.cuLaunchKernelEx(ctypes.byref(config), function, addresses, None), "cuLaunchKernelEx")
