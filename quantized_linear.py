"""int8, int4 and MXFP4 weights: one linear class per format, and the swap that puts them into a model.

Only weights are quantized. Kernels may round x to 15 or 16 bits, for products of integers,
or 4-bit weights to x's dtype, for products of several tokens. Decisions to know:

- int8 is symmetric with one scale per row (output channel). int4 has a scale and a zero point per group of a row.
- Scales and zero points are bf16, in int4 whole multiples of a row's steps, so that a byte holds each. They are rounded
  first, and the weights then fitted to them.
- MXFP4 has a power of two per group of 32. Of a mixture the experts alone become MXFP4, which is the form of gpt-oss.
  What has it already stays as it is when the rest is quantized. Only GPUs have a kernel for it.
- Every linear layer is quantized, and the output head. The embedding is not: a token reads one row of it. A tied head
  gets a quantized copy of the embedding, which ends the tie.
- The head is int8 beside 4-bit weights too. It is the most sensitive matrix: of SmolLM2's perplexity of 26.78, an int4
  head alone makes 28.53, an int8 head 26.80, for 13% more bytes a token than all in int4 (1% on a 7B Llama).
- On disk is one canonical form, in the reference's unfused layout. Rows stay rows, so that shards and fused matrices
  are cut and joined like plain weights. What one device's kernel wants is made by `prepare` after loading.
- For a single token the packed weights are read once, as they are. For many they are dequantized, then multiplied,
  where no kernel converts them inside the product. On CPUs `cpu_kernels.py` does so for any number of tokens. Without
  it PyTorch's int4 operator does, and compiled int8 for up to 16. On GPUs the int8 kernel does for up to 64, those
  of 4 bits for up to 6, on Hopper for up to 64.

Copy me: needs torch, and for speed `gpu_kernels.py`, `gpu_matvec.py` and `gpu_products.py` (GPUs) and `cpu_kernels.py`
beside it.

Shapes: N output rows, K input columns, G columns in a group.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    import gpu_kernels
    import gpu_products
except ImportError:  # Triton is on GPU machines only
    gpu_kernels = gpu_products = None
try:
    import cpu_kernels
except ImportError:  # the file was left behind
    cpu_kernels = None

MODES = ("int8", "int4", "mxfp4")
PARTS_CUT_OFF = (0, 0.03, 0.06, 0.09, 0.12)  # of the range of a group in int4
GROUP_SIZES = (32, 64, 128, 256)  # of int4


def int4_linear_cpu(x, weight, scales, group_size: int):
    """PyTorch's int4 product of x [T, K], weights and scales laid out by `Int4Linear.prepare`; [T, N]."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group_size, scales)


# An operator of its own, because the compiler's rewriting of PyTorch's fails in a nested region (torch 2.13: "group
# size must be a scalar"). `torch.library.custom_op` takes 50 us a call, as much as the product itself.
if not hasattr(torch.ops.gpt_twin, "int4_linear_cpu"):  # a lifted copy may be loaded beside this file
    torch.library.define(
        "gpt_twin::int4_linear_cpu", "(Tensor x, Tensor weight, Tensor scales, int group_size) -> Tensor"
    )
    torch.library.impl("gpt_twin::int4_linear_cpu", "cpu", int4_linear_cpu)
    torch.library.register_fake(
        "gpt_twin::int4_linear_cpu", lambda x, weight, scales, group_size: x.new_empty(x.shape[0], scales.shape[1])
    )


def compiles_for_few_tokens(x) -> bool:
    """Whether a graph is being made in which x [..., D] is of 16 tokens or less, and always as many."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # which takes a start half a second

    return statically_known_true(x.numel() <= 16 * x.shape[-1])


class Int8Linear(nn.Module):
    """y = (x @ weight.T) * scales + bias, with weight int8 [N, K] and scales [N]."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(out_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.for_gpu_kernels = False

    @staticmethod
    def quantize(weight) -> dict:
        """{"weight", "scales"} of a weight [N, K]; the largest of a row becomes 127."""
        weight = weight.float()
        scales = (weight.abs().amax(1).clamp(min=1e-8) / 127).bfloat16()
        q = (weight / scales.float()[:, None]).round().clamp(-127, 127)
        return {"weight": q.to(torch.int8), "scales": scales}

    @staticmethod
    def dequantize(weight, scales):
        """[N, K] in the dtype of the scales; in float32 the exact numbers."""
        return weight.to(scales.dtype) * scales[:, None]

    def prepare(self, experts: bool = False):
        self.for_gpu_kernels = gpu_kernels is not None and gpu_kernels.runs_on(self.weight.device)

    def gpu_weights(self):
        """What `gpu_products.linear` takes after x; None if that is not how they are laid out."""
        return (self.weight, self.scales) if self.for_gpu_kernels else None

    def cpu_weights(self, x):
        """What `cpu_kernels.linear` takes after x [T, K]; None if it takes no such x."""
        taken = cpu_kernels is not None and self.scales.dtype != torch.float16 and cpu_kernels.takes(x, self.weight)
        return (self.weight, self.scales) if taken else None

    def plain_weight(self, dtype):
        """The weight as it multiplies, [N, K]."""
        if self.for_gpu_kernels:
            return gpu_products.dequantize(self.weight, self.scales, None, dtype)
        return self.dequantize(self.weight, self.scales.to(dtype))

    def rows(self, expert, experts: int):
        """Each expert's rows [n, N/experts, K] of a matrix of so many, `expert` [n], as they multiply."""
        weight, scales = (t.unflatten(0, (experts, -1))[expert] for t in (self.weight, self.scales.float()))
        return weight * scales[..., None]

    def forward(self, x):
        rows = x.flatten(0, -2)
        if self.for_gpu_kernels:
            return gpu_products.linear(rows, *self.gpu_weights(), bias=self.bias).view(*x.shape[:-1], -1)
        if self.cpu_weights(rows):
            y = cpu_kernels.linear(rows, *self.cpu_weights(rows)).view(*x.shape[:-1], -1)
        elif compiles_for_few_tokens(x):
            # One fused loop over the int8 weights for all of a few tokens; of a dynamic number there is no telling.
            y = torch.stack([(self.weight * row).sum(-1) for row in rows.float()]) * self.scales.float()
            y = y.to(x.dtype).view(*x.shape[:-1], -1)
        elif x.dtype == torch.float16:  # sums that are not scaled yet may be too large for it
            y = F.linear(x, self.plain_weight(x.dtype))
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scales
        return y if self.bias is None else y + self.bias


class Int4Linear(nn.Module):
    """weight uint8 [N, K/2], scales and zeros [N, K/G]: numbers (q - 8) * scale + zero with q of 4 bits.

    Byte j of a row holds q of column 2 j in its low half and of column 2 j + 1 in its high half. Raises ValueError if G
    is no multiple of 32, which kernels rely on.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, group_size: int):
        super().__init__()
        if group_size not in range(32, in_features + 1, 32):
            raise ValueError(f"int4 takes groups of a multiple of 32 columns, not {group_size}")
        groups = in_features // group_size
        self.register_buffer("weight", torch.empty(out_features, in_features // 2, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(out_features, groups))
        self.register_buffer("zeros", torch.empty(out_features, groups))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.group_size, self.for_gpu_kernels, self.cpu_scales = group_size, False, None

    @staticmethod
    def quantize(weight, group_size: int) -> dict:
        """{"weight", "scales", "zeros"} of a weight [N, K]."""
        groups = weight.float().unflatten(1, (-1, group_size))  # [N, K/G, G]
        scales, zeros = Int4Linear.grid(groups, *Int4Linear.steps(groups))
        q = Int4Linear.nearest(groups, scales[..., None], zeros[..., None])
        return {"weight": Int4Linear.pack(q.flatten(1)), "scales": scales, "zeros": zeros}

    @staticmethod
    def steps(groups):
        """Powers of two [N, 1]: a scale of a row's groups [N, K/G, G] is 1 to 255 times the first, a zero -127 to 127
        times the second, so that a byte holds each, and bf16 too."""
        low, high = groups.amin(-1), groups.amax(-1)
        step = (high - low).clamp(min=1e-8) / 15
        zeros = ((low + high + step) / 2).abs().clamp(min=1e-30)

        def power(values, bits):  # the least with which the row's largest, some percent more, takes so many bits
            return torch.ldexp(torch.ones_like(step[:, :1]), (1.02 * values.amax(1, True)).frexp().exponent - bits)

        zero_step = power(zeros, 7)
        return power(step + zero_step / 14, 8), zero_step  # a zero's rounding is half of that, a scale bears a seventh

    @staticmethod
    def grid(groups, scale_step, zero_step):
        """(scales, zeros), bf16 [...], of each group [..., G]. Its 16 numbers lie over its range, or over the middle of
        it where cut-off ends make the squared errors less. Scales and zeros are multiples of `steps`."""
        low, high = groups.amin(-1), groups.amax(-1)
        best = torch.full_like(low, float("inf"))
        scales, zeros = torch.zeros_like(low), torch.zeros_like(low)
        for cut in PARTS_CUT_OFF:
            bottom, top = low.lerp(high, cut / 2), high.lerp(low, cut / 2)
            zero = (bottom + top + (top - bottom) / 15) / 2
            zero = (zero / zero_step).round().clamp(-127, 127) * zero_step
            scale = torch.maximum((zero - bottom) / 8, (top - zero) / 7)  # the least that reaches both ends
            scale = (scale / scale_step).ceil().clamp(1, 255) * scale_step
            q = Int4Linear.nearest(groups, scale[..., None], zero[..., None])
            errors = ((q - 8) * scale[..., None] + zero[..., None] - groups).square().sum(-1)
            worse = errors >= best
            best = torch.where(worse, best, errors)
            scales, zeros = torch.where(worse, scales, scale), torch.where(worse, zeros, zero)
        return scales.bfloat16(), zeros.bfloat16()

    @staticmethod
    def nearest(weight, scales, zeros):
        """q, float32, from 0 to 15, of float32 weights."""
        return ((weight - zeros.float()) / scales.float() + 8).round().clamp(0, 15)

    @staticmethod
    def pack(q):
        """The bytes [N, K/2] of q [N, K]."""
        q = q.to(torch.uint8)
        return q[:, ::2] | q[:, 1::2] << 4

    @staticmethod
    def unpack(weight):
        """q [N, K], uint8 from 0 to 15, of a packed weight [N, K/2]."""
        return torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1)

    @staticmethod
    def dequantize(weight, scales, zeros):
        """[N, K] in the dtype of the scales; in float32 the exact numbers."""
        q = Int4Linear.unpack(weight).unflatten(1, (scales.shape[1], -1)).to(scales.dtype)
        return ((q - 8) * scales[..., None] + zeros[..., None]).flatten(1)

    def cpu_weights(self, x):
        """What `cpu_kernels.linear` takes after x [T, K]; None if it takes no such x."""
        as_stored = self.cpu_scales is None and self.scales.dtype == torch.bfloat16
        taken = as_stored and cpu_kernels is not None and cpu_kernels.takes(x, self.weight)
        return (self.weight, self.scales, self.zeros) if taken else None

    def plain_weight(self, dtype):
        """The weight as it multiplies, [N, K], if it is not in a CPU kernel's layout."""
        if self.for_gpu_kernels:
            return gpu_products.dequantize(self.weight, self.scales, self.zeros, dtype)
        return self.dequantize(self.weight, self.scales.to(dtype), self.zeros.to(dtype))

    def rows(self, expert, experts: int):
        """Each expert's rows [n, N/experts, K] of a matrix of so many, `expert` [n], in the layout on disk."""
        parts = (t.unflatten(0, (experts, -1))[expert] for t in (self.weight, self.scales.float(), self.zeros.float()))
        return self.dequantize(*(part.flatten(0, 1) for part in parts)).unflatten(0, (len(expert), -1))

    def prepare(self, experts: bool = False):
        """Change to the layout of this device's kernel. `gpu_products.py` takes scales and zeros as bytes, if they are
        multiples of such `steps`; `cpu_kernels.py` takes all as it is on disk. Without it, PyTorch's kernel takes bf16
        and a multiple of 16 rows, and no matrix of experts, of which single rows are read. Load a state dict before
        this: it has the layout on disk."""
        device, dtype = self.weight.device, self.scales.dtype
        if self.prepared:
            return
        by_torch = dtype == torch.bfloat16 and self.group_size in GROUP_SIZES
        if gpu_kernels is not None and gpu_kernels.runs_on(device):
            self.scales, self.zeros = gpu_products.in_bytes(self.scales, self.zeros)
            self.for_gpu_kernels = True
        elif device.type == "cpu" and cpu_kernels is not None and cpu_kernels.available():
            self.scales, self.zeros = self.scales.bfloat16(), self.zeros.bfloat16()  # as they are on disk
        elif device.type == "cpu" and by_torch and len(self.weight) % 16 == 0 and not experts:
            q = self.unpack(self.weight)
            self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
            self.cpu_scales = torch.stack([self.scales.T, self.zeros.T], dim=-1).contiguous()  # [K/G, N, 2]

    @property
    def prepared(self) -> bool:
        """Whether the weight is in the layout of a kernel."""
        return self.for_gpu_kernels or self.cpu_scales is not None

    def gpu_weights(self):
        """What `gpu_products.linear` takes after x; None if that is not how they are laid out."""
        return (self.weight, self.scales, self.zeros) if self.for_gpu_kernels else None

    def forward(self, x):
        rows = x.flatten(0, -2)
        if self.for_gpu_kernels:
            return gpu_products.linear(rows, *self.gpu_weights(), bias=self.bias).view(*x.shape[:-1], -1)
        if self.cpu_weights(rows):
            y = cpu_kernels.linear(rows, *self.cpu_weights(rows))
        elif self.cpu_scales is not None:
            y = torch.ops.gpt_twin.int4_linear_cpu(rows, self.weight, self.cpu_scales, self.group_size)
        else:
            y = F.linear(rows, self.plain_weight(rows.dtype))
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Mxfp4Linear(nn.Module):
    """weight uint8 [N, K/2], scales uint8 [N, K/32]: numbers of 4 bits times 2^(scale - 127).

    The bits are sign, two of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. The format
    is that of the Open Compute Project's Microscaling specification of 2023. Bytes are as in Int4Linear.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.register_buffer("weight", torch.empty(out_features, in_features // 2, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(out_features, in_features // 32, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.for_gpu_kernels = False

    @staticmethod
    def quantize(weight) -> dict:
        """{"weight", "scales"} of a weight [N, K]: to the nearest number, of two as near to the one of even bits.

        A scale is the least with which its group's largest number is within 6, so that none is cut off. (The
        specification's own, in its section 6.3, is half of that where the largest would be between 6 and 8.)
        """
        groups = weight.float().unflatten(1, (-1, 32))  # [N, K/32, 32]
        mantissa, exponent = torch.frexp(groups.abs().amax(-1) / 6)  # a mantissa is from 0.5 to below 1, or 0
        scales = (exponent - (mantissa == 0.5).int() + 127).clamp(min=1)
        x = groups / (scales << 23).view(torch.float32)[..., None]
        size = x.abs()
        q = torch.where(size < 2, (2 * size).round(), torch.where(size < 4, 2 + size.round(), 4 + (size / 2).round()))
        q = q.clamp(max=7) + 8 * (x < 0)
        return {"weight": Int4Linear.pack(q.flatten(1)), "scales": scales.to(torch.uint8)}

    @staticmethod
    def dequantize(weight, scales):
        """[N, K] in float32, the exact numbers, which bf16 holds too."""
        q, scales = Int4Linear.unpack(weight).int(), scales.int()
        exponent, mantissa = q >> 1 & 3, q & 1
        bits = exponent + 126 << 23 | mantissa << 22  # a graph's 2^x is not exact
        large = bits.view(torch.float32)
        numbers = torch.where(exponent > 0, large, 0.5 * mantissa) * (1 - (q >> 3 << 1))
        return (numbers.unflatten(1, (-1, 32)) * (scales << 23).view(torch.float32)[..., None]).flatten(1)

    def prepare(self, experts: bool = False):
        """On a GPU let its kernel take the weights, as they are."""
        self.for_gpu_kernels = gpu_kernels is not None and gpu_kernels.runs_on(self.weight.device)

    def gpu_weights(self):
        """What `gpu_products.linear` takes after x; None if that is not how they are laid out."""
        return (self.weight, self.scales) if self.for_gpu_kernels else None

    def cpu_weights(self, x):
        """None: no kernel takes it."""

    def plain_weight(self, dtype):
        """The weight as it multiplies, [N, K]."""
        if self.for_gpu_kernels:
            return gpu_products.dequantize(self.weight, self.scales, None, dtype)
        return self.dequantize(self.weight, self.scales).to(dtype)

    def rows(self, expert, experts: int):
        """Each expert's rows [n, N/experts, K] of a matrix of so many, `expert` [n], as they multiply."""
        parts = (t.unflatten(0, (experts, -1))[expert].flatten(0, 1) for t in (self.weight, self.scales))
        return self.dequantize(*parts).unflatten(0, (len(expert), -1))

    def forward(self, x):
        if self.for_gpu_kernels:
            y = gpu_products.linear(x.flatten(0, -2), *self.gpu_weights(), bias=self.bias)
            return y.view(*x.shape[:-1], -1)
        return F.linear(x, self.plain_weight(x.dtype), self.bias)


def quantize_weights(state_dict: dict, mode: str, group_size: int | None) -> dict:
    """A quantized state dict, in the reference's layout, of a plain one. Weights are taken one at a time.

    Only names that end in `_proj.weight` or `lm_head.weight` are quantized: `GPT` calls its linear layers so. The head
    becomes int8 in every mode. Raises ValueError if a weight does not divide into groups, or is quantized already.
    """
    quantized = {}
    for name, tensor in state_dict.items():
        if not name.endswith(("_proj.weight", "lm_head.weight")):
            quantized[name] = tensor
            continue
        kind = "int8" if name == "lm_head.weight" else mode
        check_weight(name, tensor, {"int8": None, "int4": group_size, "mxfp4": 32}[kind])
        # Some rows at a time: their float32 copies stay in a processor's cache, and the memory is the result's.
        some = tensor.split(max(1, (2**20 if tensor.device.type == "cpu" else 2**24) // tensor.shape[1]))
        parts = [quantize_rows(rows, kind, group_size) for rows in some]
        for part in parts[0]:
            quantized[f"{name.removesuffix('weight')}{part}"] = torch.cat([tensors[part] for tensors in parts])
    return quantized


def quantize_rows(weight, mode: str, group_size: int | None) -> dict:
    """The tensors of a format, by their names in a module, of a weight [N, K]."""
    if mode == "int4":
        return Int4Linear.quantize(weight, group_size)
    return {"int8": Int8Linear, "mxfp4": Mxfp4Linear}[mode].quantize(weight)


def check_weight(name: str, tensor, group_size: int | None) -> None:
    """Raises ValueError if a weight cannot be quantized; with group_size None, to int8."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is quantized already; start from the plain checkpoint")
    if group_size and tensor.shape[1] % group_size:
        fits = ", ".join(str(size) for size in GROUP_SIZES if tensor.shape[1] % size == 0) or "none, so use int8"
        raise ValueError(
            f"{name} has {tensor.shape[1]} columns, which groups of {group_size} do not divide; of the group sizes "
            f"these do: {fits}"
        )


def dequantize_weights(state_dict: dict) -> dict:
    """A plain float32 state dict with exactly the numbers of a quantized one; of a plain one, itself."""
    plain = {}
    for name, tensor in state_dict.items():
        module, _, kind = name.rpartition(".")
        scales, zeros = state_dict.get(f"{module}.scales"), state_dict.get(f"{module}.zeros")
        if kind == "weight" and scales is not None and scales.dtype == torch.uint8:
            plain[name] = Mxfp4Linear.dequantize(tensor, scales)
        elif kind == "weight" and zeros is not None:
            plain[name] = Int4Linear.dequantize(tensor, scales.float(), zeros.float())
        elif kind == "weight" and scales is not None:
            plain[name] = Int8Linear.dequantize(tensor, scales.float())
        elif kind not in ("scales", "zeros"):
            plain[name] = tensor
    return plain


def swap_linears(model: nn.Module, state_dict: dict) -> None:
    """Put a quantized module in the place of each nn.Linear that has scales in the state dict of this layout.

    It is on the same device and computes in the same dtype. `load_state_dict` then fills it.
    """
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or f"{name}.scales" not in state_dict:
            continue
        size = linear.in_features, linear.out_features, linear.bias is not None
        with linear.weight.device:
            if state_dict[f"{name}.scales"].dtype == torch.uint8:
                module = Mxfp4Linear(*size)
            elif f"{name}.zeros" in state_dict:
                module = Int4Linear(*size, group_size=linear.in_features // state_dict[f"{name}.scales"].shape[1])
            else:
                module = Int8Linear(*size)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.to(linear.weight.dtype))
