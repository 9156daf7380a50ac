"""Quantize a checkpoint's weights: to the nearest grid point, or by GPTQ with a text.

    python quantize.py --checkpoint_path checkpoints/NAME/model.pth --mode int4 --group_size 32
    python quantize.py --checkpoint_path checkpoints/NAME/model.pth --mode int4-gptq --calibration FILE

`quantized_linear.py` says what the formats are. Decisions to know:

- int4-gptq is int4 with another choice of weights, made with a text: the file has the same form and is read the same.
- A layer at a time is on the device, in float32. Its input is what the quantized layers before it make of the text.
- A mixture of experts is not calibrated: each expert sees a part of the text alone.
- mxfp4 quantizes a mixture's experts alone, and leaves the rest to a second run with int8 on its file.

Copy me: needs torch and tqdm, and `model.py`, `fast_model.py`, `quantized_linear.py`, `cpu_kernels.py`, `tp.py`,
`runtime.py`, `checkpoint.py` and `tokenizer.py` beside it, with its libraries.

Shapes: N output rows, K input columns.
"""

import argparse
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import quantize_model, read_checkpoint, untie_head, write_checkpoint
from model import Block
from quantized_linear import GROUP_SIZES, MODES, Int4Linear, check_weight, quantize_weights
from runtime import check_device, check_target, default_device, positive, read_text, run_command
from tokenizer import find_tokenizer

BLOCK = 128  # columns that are quantized before the rest of the matrix is updated; group sizes divide it or it them
SEQUENCE = 512  # tokens of calibration text that are seen together


def gptq(weight, hessian, group_size: int) -> dict:
    """Int4Linear's parts of a weight [N, K] by GPTQ (Frantar et al. 2022).

    `hessian` [K, K] is the sum of x x^T over inputs x. Column after column is rounded, and what that changes in the
    outputs is made up for, as far as it can be, by the columns that are still to come.
    """
    columns = weight.float().T.contiguous()  # [K, N]
    # The damping makes a column that no input reaches independent of the others, so that it is rounded to nearest.
    damping = (hessian.diagonal().mean() / 100).clamp(min=1e-8)
    damped = hessian + damping * torch.eye(len(columns), device=hessian.device)
    # inverse(hessian) = upper.T @ upper. Flipped twice, the lower factor of the hessian is the upper of H = R R^T.
    factor = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    upper = torch.linalg.solve_triangular(factor, torch.eye(len(columns), device=hessian.device), upper=True)
    q, errors = torch.empty_like(columns), torch.empty_like(columns)
    scales, zeros = [], []
    steps = [step[:, 0] for step in Int4Linear.steps(weight.float().unflatten(1, (-1, group_size)))]
    for start in range(0, len(columns), BLOCK):
        end = min(start + BLOCK, len(columns))
        for i in range(start, end):
            if i % group_size == 0:  # the group as it is by now, which holds its share of the errors before it
                scale, zero = Int4Linear.grid(columns[i : i + group_size].T, *steps)
                scales.append(scale)
                zeros.append(zero)
            q[i] = Int4Linear.nearest(columns[i], scale, zero)
            errors[i] = (columns[i] - ((q[i] - 8) * scale.float() + zero.float())) / upper[i, i]
            columns[i + 1 : end].addr_(upper[i, i + 1 : end], errors[i], alpha=-1)
        columns[end:] -= upper[start:end, end:].T @ errors[start:end]
    return {"weight": Int4Linear.pack(q.T), "scales": torch.stack(scales, 1), "zeros": torch.stack(zeros, 1)}


def dequantize_int4(parts: dict):
    return Int4Linear.dequantize(parts["weight"], parts["scales"].float(), parts["zeros"].float())


def output_error(weight, parts: dict, hessian) -> float:
    """||x W^T - x Q^T||^2 / ||x W^T||^2 over the inputs x of a hessian."""
    change = weight - dequantize_int4(parts)
    return ((change @ hessian * change).sum() / (weight @ hessian * weight).sum()).item()


def input_hessians(module: nn.Module, xs) -> dict:
    """{name: sum of x x^T [K, K] over its inputs x} of each nn.Linear in a module that is given xs [B, T, D]."""
    inputs, hessians = {}, {}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(0, -2)}))
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear)
    ]
    for x in xs.split(1):
        module(x)
        for name, given in inputs.items():
            same = next(other for other, seen in inputs.items() if seen.data_ptr() == given.data_ptr())  # q, k and v
            if same != name:
                hessians[name] = hessians[same]
            elif name in hessians:
                hessians[name].addmm_(given.T, given)
            else:
                hessians[name] = given.T @ given
    for hook in hooks:
        hook.remove()
    return hessians


@torch.no_grad()
def gptq_weights(config, state_dict: dict, group_size: int, ids, device) -> dict:
    """A state dict quantized by GPTQ of a plain one, whose head is not tied, calibrated with ids [B, T].

    A layer at a time is in float32 on the device. What the quantized layers before it make of the ids is its input. The
    head becomes int8, rounded to nearest.
    """
    if config.n_expert:
        raise ValueError("GPTQ of experts, which each see a part of the text, is not implemented; use another mode")

    for name, tensor in state_dict.items():
        if name.endswith("_proj.weight"):
            check_weight(name, tensor, group_size)
    quantized = {}
    ids = ids.to(device)
    x = F.embedding(ids, state_dict["transformer.wte.weight"].to(device)).float()  # [B, T, D]
    x *= config.embed_scale
    if config.rope_base is None:
        x += state_dict["transformer.wpe.weight"][: ids.shape[1]].to(device)
    for i in tqdm(range(config.n_layer), desc="layers"):
        prefix, errors = f"transformer.h.{i}.", []
        with torch.device("meta"):
            block = Block(config, i)
        tensors = {name: state_dict[prefix + name].to(device, torch.float32) for name in block.state_dict()}
        block.load_state_dict(tensors, assign=True)
        for name, hessian in input_hessians(block, x).items():
            linear = block.get_submodule(name)
            rounded = Int4Linear.quantize(linear.weight, group_size)
            parts = gptq(linear.weight, hessian, group_size)
            errors.append([output_error(linear.weight, choice, hessian) for choice in (rounded, parts)])
            linear.weight = nn.Parameter(dequantize_int4(parts))  # a new one: the old may be the state dict's own
            quantized |= {f"{prefix}{name}.{part}": tensor.cpu() for part, tensor in parts.items()}
        nearest, by_gptq = torch.tensor(errors).mean(0).tolist()
        tqdm.write(f"layer {i}: error {nearest:.2e} rounded to nearest, {by_gptq:.2e} by GPTQ")
        for row in x.split(1):
            row.copy_(block(row))
    rest = {name: tensor for name, tensor in state_dict.items() if not name.endswith("_proj.weight")}
    return quantize_weights(rest, "int8", None) | quantized


def read_calibration(file: Path, tokenizer, block_size: int, max_tokens: int):
    """ids [B, T] of sequences spread evenly over a text. Raises ValueError if the text does not fill one."""
    ids = torch.tensor(tokenizer.encode(read_text(file, newline="")))
    length = min(block_size, SEQUENCE)
    count = len(ids) // length
    if not count:
        raise ValueError(f"{file} has {len(ids)} tokens; calibration needs at least {length}")
    kept = torch.linspace(0, count - 1, min(count, max(max_tokens // length, 1))).long()
    return ids[: count * length].view(count, length)[kept]


def main(args) -> None:
    mode, path = args.mode, args.checkpoint_path
    by_gptq, tokens, group_size = mode == "int4-gptq", args.calibration_tokens, args.group_size or 32
    if by_gptq != bool(args.calibration) or (tokens and not by_gptq):
        raise ValueError("--mode int4-gptq needs --calibration, and takes --calibration_tokens; no other mode does")
    if args.group_size and not mode.startswith("int4"):
        raise ValueError(f"--group_size is for int4 and int4-gptq; leave it out of --mode {mode}")
    label = f"{mode}_g{group_size}" if mode.startswith("int4") else mode
    out = args.out_path or path.with_name(f"{path.stem}_{label}.pth")
    check_target(out, path, args.calibration)
    config, state_dict = read_checkpoint(path)
    if args.calibration:
        check_device(args.device)
        tokenizer = find_tokenizer(path.parent, config.vocab_size, needed=True)
        ids = read_calibration(args.calibration, tokenizer, config.block_size, tokens or 16384)
        config, state_dict = untie_head(config, state_dict)
        state_dict = gptq_weights(config, state_dict, group_size, ids, args.device)
    else:
        config, state_dict = quantize_model(config, state_dict, mode, group_size)
    write_checkpoint(out, config, state_dict, method="gptq" if args.calibration else "nearest")
    print(f"wrote {out}: {path.stat().st_size / 1e6:.0f} MB became {out.stat().st_size / 1e6:.0f} MB")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Quantize a checkpoint's weights.")
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="a model.pth that is not quantized")
    add("--mode", choices=(*MODES, "int4-gptq"), required=True)
    add("--group_size", type=int, choices=GROUP_SIZES, help="columns, int4 and int4-gptq only; default: 32")
    add("--calibration", type=Path, metavar="FILE", help="UTF-8 text, int4-gptq only")
    add("--calibration_tokens", type=positive, help="at most this many tokens of it are used; default: 16384")
    add("--device", default=default_device(), help="where int4-gptq computes: cpu, cuda, cuda:1, mps")
    add("--out_path", type=Path, help="default: model_int8.pth or model_int4_g32.pth beside it")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main, parse_arguments())
