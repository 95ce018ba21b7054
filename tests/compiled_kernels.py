"""Compile the kernels of an encoder for a GPU that is not here, and print what they need of it.

    python tests/compiled_kernels.py egnn

For compute capability 9.0, products in float32 and bf16, 128 and 880 hidden units.
"""

import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from multifid.model.kernels.gpu.segments import power_of_two, rows_of_tile, warps_of

INDICES = {"i": "*i64", "j": "*i64", "offsets": "*i64", "order": "*i64", "N": "i32", "K": "i32", "H": "i32"}
# Arguments (E, K) in the type of products; all others have that of the geometry.
OF_PRODUCTS = {
    "egnn": {
        "first": ["y"],
        "middle": ["z", "z_t", "m"],
        "last": ["z", "z_t"],
        "last_back": ["z", "z_t", "g_z", "y", "g_z_t", "y_t"],
        "middle_back": ["z", "g_m", "g_z", "m"],
        "middle_back_dual": ["z", "g_m", "z_t", "g_m_t", "g_z", "g_z_t", "m", "m_t"],
        "first_back": ["g_y", "g_y_t", "g_z", "g_z_t"],
        "by_sender": ["x"],
    },
    "painn": {"forward": [], "backward": [], "backward_dual": []},
}
CONSTANTS = {"P": 16, "C": 8, "R": 8}


def compiled(kernel, of_products: list[str], kind: str, constants: dict, warps: int):
    signature = {
        name: "constexpr" if name in constants else INDICES.get(name, kind if name in of_products else "*fp32")
        for name in kernel.arg_names
    }
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps},
    )


def registers(program: bytes) -> str:
    """What the machine code asks for."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr)
    return f"{found[1]} registers, {found[2]} bytes of stack"


def main(name: str) -> None:
    kernels = importlib.import_module(f"multifid.model.kernels.gpu.{name}_kernels")
    for kind in ("*fp32", "*bf16") if any(OF_PRODUCTS[name].values()) else ("*fp32",):
        for width in (128, 880):
            block = power_of_two(width)
            for kernel_name, of_products in OF_PRODUCTS[name].items():
                kernel = getattr(kernels, kernel_name)
                for dual in (False, True) if "DUAL" in kernel.arg_names else (None,):
                    rows = rows_of_tile(block, kernel_name)
                    wanted = {"KB": block, "HB": block, "ROWS": rows, "DUAL": dual, **CONSTANTS}
                    constants = {k: v for k, v in wanted.items() if k in kernel.arg_names}
                    done = compiled(kernel, of_products, kind, constants, warps_of(block, kernel_name))
                    print(f"{kernel_name} {width} {kind[1:]} dual={dual}: {registers(done.asm['cubin'])}, "
                          f"{done.metadata.shared} bytes shared")  # fmt: skip


if __name__ == "__main__":
    assert not torch.cuda.is_initialized()
    main(sys.argv[1])
