"""`model.pth`: one file that says what it is, to a ready model and back.

The file is what torch.save makes of {"format_version", "config", "quantization", "state_dict"}: a version, GPTConfig's
fields, None or how the weights are quantized, and the weights in the reference's unfused layout. Its name and folder
mean nothing. Decisions to know:

- Files are read with weights_only=True and mapped, not copied: only the tensors that are used are read from the disk.
- Loading is strict: a tensor that is missing, left over or of another shape is an error that names it.
- `_orig_mod.` and `module.`, which torch.compile and DistributedDataParallel put in front of names, are taken off.
- A file is written beside its name and renamed into place, so that a broken run leaves no broken model.pth.
- `save` and `load` are for a live model of either twin, in whatever wrappers: the file does not show which.

Copy me: needs torch, and `model.py`, `fast_model.py`, `quantized_linear.py`, `cpu_kernels.py`, `tp.py` and
`runtime.py` beside it.
"""

import hashlib
import pickle
import struct
import zipfile
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

import cpu_kernels
from fast_model import FastGPT, expert_matrices, fuse, to_fast, to_reference
from model import GPT, GPTConfig
from quantized_linear import dequantize_weights, quantize_weights, swap_linears
from runtime import say, written_in_place
from tp import shard

FORMAT_VERSION = 1
FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64  # of weights; those in int8 or int4 have scales
HALVES = torch.bfloat16, torch.float16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What torch's unpicklers raise for a damaged file.
DAMAGE = (
    RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, AssertionError, struct.error,
    pickle.PickleError, zipfile.BadZipFile,
)  # fmt: skip


def strip_prefixes(state_dict: dict) -> dict:
    """Names without the `_orig_mod` and `module` parts that wrappers add. Raises ValueError if two become one."""
    stripped = {}
    for name, tensor in state_dict.items():
        short = ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))
        if short in stripped:
            raise ValueError(f"{short} is there twice, once as {name}; take the tensors with wrappers' prefixes out")
        stripped[short] = tensor
    return stripped


def write_checkpoint(path, config: GPTConfig, state_dict: dict, method: str | None = None) -> None:
    """Write a state dict in the reference's layout. Raises ValueError if it does not fit the config.

    `method` is how its weights were quantized ("nearest", "gptq"); it is for people, and no reader looks at it.
    """
    state_dict = strip_prefixes(state_dict)
    _check_fit(state_dict, config, path)
    # A view would drag its whole storage into the file, and a parameter would not be the tensor that others write.
    whole = {name: t.detach().cpu() for name, t in state_dict.items()}
    whole = {name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for name, t in whole.items()}
    content = {
        "format_version": FORMAT_VERSION,
        "config": asdict(config),
        "quantization": describe_quantization(state_dict),
        "quantization_method": method,
        "state_dict": whole,
    }
    with written_in_place(path) as temporary:
        with open(temporary, "wb") as file:  # given a path, torch.save writes its name into the file
            torch.save(content, file)


def unwrapped(model: nn.Module) -> nn.Module:
    """The GPT or FastGPT inside what torch.compile and DistributedDataParallel put around it, in any order."""
    while not isinstance(model, (GPT, FastGPT)):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that `fully_shard` has divided, whole: in rank 0's memory, of other ranks on the device meta.

    All ranks call this together. Any other tensor stays as it is.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    return tensor.full_tensor().to("meta" if dist.get_rank() else "cpu")


def put(tensor: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a whole tensor into one that may be divided, of which this rank holds some rows."""
    if hasattr(tensor, "full_tensor"):
        mesh = tensor.device_mesh
        first, tensor = mesh.get_local_rank() * -(-len(source) // mesh.size()), tensor.to_local()
        source = source[first : first + len(tensor)]
    tensor.copy_(source)


def reference_state(model: nn.Module) -> dict:
    """The weights of a live GPT or FastGPT, wrapped or not, in the reference's layout; views where that is possible.

    Those of a model that `fully_shard` has divided are as `whole` gathers them. Raises ValueError if they are in the
    layout of a kernel for int4.
    """
    inner = unwrapped(model)
    state_dict = {name: whole(tensor) for name, tensor in strip_prefixes(inner.state_dict()).items()}
    if isinstance(inner, GPT):
        return state_dict
    if any(getattr(module, "prepared", False) for module in inner.modules()):
        raise ValueError("this model's 4-bit weights are in the layout of this device's kernel; copy its model.pth")
    return to_reference(state_dict, inner.config)


def save(model: nn.Module, path) -> None:
    """Write the `model.pth` of a GPT or FastGPT, compiled, in DistributedDataParallel, or as it is: the same file.

    Of one that `fully_shard` has divided too, if all ranks call this; rank 0 writes.
    """
    divided = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    state_dict = reference_state(model)
    if not divided or dist.get_rank() == 0:
        write_checkpoint(path, unwrapped(model).config, dict(sorted(state_dict.items())))


@torch.no_grad()
def load(model: nn.Module, path) -> None:
    """Copy the weights of a `model.pth` into a plain GPT or FastGPT, wrapped or not, in the dtype that it has.

    Raises ValueError, and changes nothing, if the file is of another config, or it or the model is quantized.
    """
    config, state_dict = read_checkpoint(path)
    inner = unwrapped(model)
    if config != inner.config:
        differ = [name for name, value in asdict(config).items() if value != getattr(inner.config, name)]
        raise ValueError(f"{path} is of another model, it differs in {', '.join(differ)}; build one of its config")
    if describe_quantization(state_dict):
        raise ValueError(f"{path} is quantized; load the model.pth that it was made from")
    if isinstance(inner, FastGPT):
        state_dict = to_fast(state_dict, config)
    own = strip_prefixes(inner.state_dict())
    if own.keys() != state_dict.keys():
        raise ValueError("this model is quantized, or has adapters; load into a plain one")
    for name, tensor in own.items():
        put(tensor, state_dict[name])


def read_checkpoint(path) -> tuple[GPTConfig, dict]:
    """(config, state dict in the reference's layout, its tensors mapped from the file).

    Raises FileNotFoundError or ValueError, with a sentence for the user, if this is not a whole checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give the model.pth in it")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; make it with convert_hf_checkpoint.py")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except DAMAGE as error:
        raise ValueError(f"{path} is not a whole torch checkpoint; convert the model again") from error
    if not isinstance(content, dict) or not {"format_version", "config", "state_dict"} <= content.keys():
        raise ValueError(f"{path} is no checkpoint of this project; make one with convert_hf_checkpoint.py")
    if content["format_version"] != FORMAT_VERSION:
        version = content["format_version"]
        raise ValueError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}; convert it again")
    try:
        config = GPTConfig(**content["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has a config that this code does not know: {error}; convert it again") from error
    state_dict = content["state_dict"]
    if not is_state_dict(state_dict):
        raise ValueError(f"{path} has a state dict that is not one of tensors; convert the model again")
    state_dict = strip_prefixes(state_dict)
    _check_fit(state_dict, config, path)
    if content.get("quantization") != describe_quantization(state_dict):
        raise ValueError(f"{path} is quantized in a way that this code does not read: {content['quantization']}")
    return config, state_dict


def describe_quantization(state_dict: dict) -> dict | None:
    """What the file says of itself; None for a plain one.

    Mode, group size, the weights left in full precision, and in modes int4 and mxfp4 "int8", those in int8. Files from
    when the head was int4 have none, and no such entry.
    """
    scaled = [name.removesuffix("scales") for name in state_dict if name.endswith(".scales")]
    if not scaled:
        return None
    int4 = [module for module in scaled if f"{module}zeros" in state_dict]
    mxfp4 = [module for module in scaled if state_dict[f"{module}scales"].dtype == torch.uint8]
    int8 = [f"{module}weight" for module in scaled if module not in int4 + mxfp4]
    kept = [name for name, tensor in state_dict.items() if name.endswith("weight") and tensor.is_floating_point()]
    if mxfp4:
        described = {"mode": "mxfp4", "group_size": 32, "full_precision": kept}
        return described | {"int8": int8} if int8 else described
    if not int4:
        return {"mode": "int8", "group_size": None, "full_precision": kept}
    group_size = 2 * state_dict[f"{int4[0]}weight"].shape[1] // state_dict[f"{int4[0]}scales"].shape[1]
    described = {"mode": "int4", "group_size": group_size, "full_precision": kept}
    return described | {"int8": int8} if int8 else described


def untie_head(config: GPTConfig, state_dict: Mapping) -> tuple[GPTConfig, Mapping]:
    """Config and weights in which a tied head is a head of its own. A weight is asked for when it is used."""
    if not config.tie_embeddings:
        return config, state_dict
    head = {"lm_head.weight": state_dict["transformer.wte.weight"]}
    return replace(config, tie_embeddings=False), ChainMap(head, state_dict)


def quantize_model(
    config: GPTConfig, state_dict: Mapping, mode: str, group_size: int, rank: int = 0, ranks: int = 1
) -> tuple[GPTConfig, dict]:
    """Config and weights with quantized linear layers; a tied head becomes a quantized head of its own. What is in
    MXFP4 stays so in another mode. In mode mxfp4 a mixture's experts alone are quantized.

    With `ranks`, the shard of the quantized weights that `rank` holds; of one matrix at a time the whole.
    """
    experts_alone = mode == "mxfp4" and config.n_expert
    if not experts_alone:
        config, state_dict = untie_head(config, state_dict)
    quantized = {}
    for name, tensor in state_dict.items():
        scales = state_dict.get(f"{name.rpartition('.')[0]}.scales")
        in_mxfp4 = scales is not None and scales.dtype == torch.uint8
        part = {name: tensor}
        if ".experts." in name if experts_alone else mode == "mxfp4" or not in_mxfp4:
            part = quantize_weights(part, mode, group_size)
        part = shard(part, config, rank, ranks)
        quantized |= {name: t.clone() for name, t in part.items()} if ranks > 1 else part
    return config, quantized


def shapes_of(config: GPTConfig) -> dict:
    """{name: shape} of the reference's state dict."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}


def is_state_dict(content) -> bool:
    """Whether this is named tensors, of whatever dtype."""
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    )


def check_size(config: GPTConfig, numbers: int, path) -> None:
    """Raises ValueError if the config asks for more weights than there are numbers: building it may never end."""
    table = config.vocab_size + (config.block_size if config.rope_base is None else 0)
    layer = config.n_head * config.head_dim + max(config.n_expert, 1) * config.hidden_dim
    least = config.dim * (table + config.n_layer * layer)  # with one matrix of each attention and feed-forward
    if least > numbers:
        count = f"at least {least:,}" if least < 10**15 else "far more"
        raise ValueError(f"the weights in {path} are {numbers:,} numbers, where its config asks for {count}")


def check_dtype(tensor, where: str, dtypes=FLOATS) -> None:
    """Raises ValueError, with `where` as its first words, if these are no numbers of one of the dtypes."""
    form = f"{tensor.layout} {tensor.dtype}".replace("torch.", "").replace("strided ", "")
    form = "nested " * tensor.is_nested + form + " without values (on the device meta)" * tensor.is_meta
    if form not in [str(dtype).removeprefix("torch.") for dtype in dtypes]:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{where} is {form}; it must be {known}")


def _check_fit(state_dict: dict, config: GPTConfig, path) -> None:
    check_size(config, 2 * sum(tensor.numel() for tensor in state_dict.values()), path)  # int4: two in a byte
    with torch.device("meta"):
        model = GPT(config)
        try:
            swap_linears(model, state_dict)
        except (ValueError, LookupError, ZeroDivisionError) as error:
            raise ValueError(f"{path} has scales of other groups than this code reads ({error})") from error
    expected = model.state_dict()
    for name in sorted(expected.keys() | state_dict.keys()):
        if name not in state_dict:
            raise ValueError(f"{path} lacks the tensor {name}")
        if name not in expected:
            raise ValueError(f"{path} has the tensor {name}, for which the model has no place")
        dtype = expected[name].dtype
        check_dtype(state_dict[name], f"{name} in {path}", FLOATS if dtype.is_floating_point else [dtype])
        if state_dict[name].shape != expected[name].shape:
            shapes = f"{list(state_dict[name].shape)}, where its config asks for {list(expected[name].shape)}"
            raise ValueError(f"{path} has {name} in the shape {shapes}")


def build_model(
    config: GPTConfig, state_dict: dict, device, dtype, reference: bool = False, rank: int = 0, ranks: int = 1,
    keep_16_bits: bool = False,
) -> nn.Module:  # fmt: skip
    """A ready FastGPT, or GPT (`reference`) with dequantized weights, from a state dict in the reference's layout.

    With `ranks`, the FastGPT of a `rank` from its shard of the state dict. With `keep_16_bits`, matrices that are in
    bfloat16 or float16 stay so where a kernel multiplies them with float32: the same numbers in half the bytes.
    """
    keep_16_bits = keep_16_bits and not reference and str(device) == "cpu" and dtype == torch.float32
    kept = HALVES if keep_16_bits and cpu_kernels.available() else ()

    def place(tensor):
        as_it_is = not tensor.is_floating_point() or (tensor.dim() == 2 and tensor.dtype in kept)
        return tensor.to(device, None if as_it_is else dtype).contiguous()

    if reference:
        placed = {name: place(tensor) for name, tensor in dequantize_weights(state_dict).items()}
    else:
        placed = dict(fuse(state_dict, config, place))
    with torch.device("meta"):
        model = GPT(config) if reference else FastGPT(config, rank, ranks)
        swap_linears(model, placed)
    model.load_state_dict(placed, strict=True, assign=True)
    del placed
    experts = expert_matrices(model)
    for module in model.modules():
        if hasattr(module, "prepare"):
            module.prepare(experts=module in experts)
    return model.eval().requires_grad_(False)


def default_dtype(device: str, state_dict: dict) -> torch.dtype:
    """The checkpoint's own, on an NVIDIA GPU bfloat16 for a float32 one, which is twice as fast there. A GPU older than
    Ampere has no bfloat16 of its own, and computes such a checkpoint in float16.

    On a CPU it is float32, with weights that may stay in 16 bits (`build_model`). int4 weights without
    `cpu_kernels.py` are computed in bfloat16 there: PyTorch has its fast product for that dtype alone.
    """
    stored = state_dict["transformer.wte.weight"].dtype
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16 if stored == torch.float32 else stored
        return torch.float16 if stored == torch.bfloat16 else stored
    if device != "cpu":
        return stored
    int4 = (describe_quantization(state_dict) or {}).get("mode") == "int4"
    return torch.bfloat16 if int4 and not cpu_kernels.available() else torch.float32


def choose_dtype(path, state_dict: dict, device: str, precision: str | None) -> torch.dtype:
    """The precision that was asked for, else the default, which is said where it is not the checkpoint's."""
    if precision:
        return DTYPES[precision]
    dtype, stored = default_dtype(device, state_dict), state_dict["transformer.wte.weight"].dtype
    if dtype != stored:
        computed, kept = (str(kind).removeprefix("torch.") for kind in (dtype, stored))
        say(f"{path} is in {kept} and is computed in {computed} here; --precision {kept} keeps it")
    return dtype


def fingerprint(config, state_dict: dict) -> str:
    """A digest of a config, and of each tensor's name, shape and first numbers: of another model it is another one.

    Of a mapped file that is a page a tensor.
    """
    digest = hashlib.sha256(repr(config).encode())
    for name, tensor in state_dict.items():
        first = bytes(tensor.flatten()[:64].view(torch.uint8).tolist())
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + first)
    return digest.hexdigest()
