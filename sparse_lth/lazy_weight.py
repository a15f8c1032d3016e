"""SparseWeight, what outside code reads as the `weight` of a sparse layer."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

FLAGS = ("cuda", "cpu", "meta", "xpu", "mps", "sparse", "quantized", "nested", "mkldnn")
READS_NOTHING = {  # answered without numbers
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim")),
    *(getattr(Tensor, f"is_{name}").__get__ for name in FLAGS),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.itemsize.__get__),
    *(Tensor.get_device, Tensor.__hash__),
}
WRITES = {  # besides the functions whose names end in an underscore
    *("__setitem__", "__delitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__"),
    *("__ifloordiv__", "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__"),
    *("register_hook", "register_post_accumulate_grad_hook", "retain_grad", "data_ptr"),
}


class SparseWeight(Tensor):
    """The dense weight of a sparse layer, as a tensor whose numbers are made when they are needed.

    Shape, dtype and device cost nothing. `F.linear(x, weight, bias)` runs the sparse kernels; every
    other function gets the dense weight, through which gradients reach `weight_values`. What would
    write to it, or keep its address, raises RuntimeError: nobody would see what was written.
    """

    @classmethod
    def of(cls, layer, detached: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """layer: a BlockSparse, or, detached and with the dtype of its `shaped_weight`, one in int8

        detached: whether gradients stop here
        """
        if torch.compiler.is_dynamo_compiling():  # which drops the numbers that nobody needs
            return layer.shaped_weight().as_subclass(TracedWeight)
        values = layer.weight_values
        weight = Tensor._make_wrapper_subclass(
            cls, layer.weight_shape, dtype=dtype or values.dtype, device=values.device
        )
        weight._layer, weight._detached = layer, detached
        return weight

    @property
    def requires_grad(self) -> bool:
        return not self._detached and self._layer.weight_values.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self._layer.weight_values.requires_grad = value

    def requires_grad_(self, requires_grad: bool = True) -> "SparseWeight":
        """Freezes the stored weights, or lets them train."""
        self.requires_grad = requires_grad
        return self

    @property
    def grad(self) -> Tensor | None:
        """The dense gradient of the stored weights."""
        layer = self._layer
        grad = None if self._detached else layer.weight_values.grad
        return None if grad is None else layer.shaped_weight(grad)

    @property
    def data(self) -> Tensor:
        return self.detach()

    def detach(self) -> Tensor:
        return self.of(self._layer, True, self.dtype)

    def dense(self) -> Tensor:
        """The numbers, in a plain tensor."""
        if self._detached:
            with torch.no_grad():
                return self._layer.shaped_weight()
        return self._layer.shaped_weight()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS_NOTHING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        writes = name in WRITES or (name.endswith("_") and not name.endswith("__"))
        if (writes and isinstance(args[0], cls)) or isinstance(kwargs.get("out"), cls):
            raise RuntimeError(
                f"the weight of a sparse layer is there to be read, so {name} would be lost: "
                "write to its weight_values, or convert the layer with to_dense() first"
            )
        if func is F.linear and isinstance(args[1] if len(args) > 1 else None, cls):
            x, weight, bias = (*args, *([kwargs.get("bias")] * (len(args) < 3)))
            if not isinstance(x, cls) and not weight._detached and weight.dim() == 2:
                return weight._layer.product(x, bias)
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """For code in C++, below autograd: the right numbers, or no silent loss of a gradient."""
        if torch.is_grad_enabled() and any(
            isinstance(t, cls) and t.requires_grad for t in (*args, *(kwargs or {}).values())
        ):
            raise RuntimeError(
                f"{func} reads the weight of a sparse layer where its gradient would be lost: "
                "give it layer.dense_weight()"
            )
        with torch.no_grad():
            args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


class TracedWeight(Tensor):
    """The same inside a compiled graph. Being a subclass, it keeps torch's fused layers, which read
    weights and call no module, from taking the dense weight where the module would run sparse."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
