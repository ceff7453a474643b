"""Checks GPU kernels on a machine without a GPU.

| module | what it gives |
|---|---|
| `targets.py` | the GPUs that are stood in for, and their limits |
| `driver.py` | a Triton driver with no GPU behind it: the project's own launch code runs on CPU tensors, is really compiled, and then executed by the emulator, or only recorded |
| `facts.py` | what a compiled kernel uses: registers, spills, shared memory, matrix instructions, copy widths, buffers |
| `parse.py` `arithmetic.py` `memory.py` `matrix.py` `execute.py` | an emulator of the compiled PTX |
| `interpreter.py` | Triton's interpreter made honest: right bf16, bounds and race checks, counted arithmetic |
| `mutate.py` | kernels with a planted bug |

The emulator executes PTX for sm_80 (mma.sync, ldmatrix, cp.async) and sm_90 (wgmma with swizzled descriptors). Every
register is one array over all threads of the launch. Global memory knows which tensor owns a byte, so an access that
is out of bounds, misaligned or in another tensor's memory raises `Fault`, and so does a race between programs. An
asynchronous copy lands as late as the wait instructions allow: until then its destination is poisoned.

Not covered by any of it: time; bugs of ptxas or in machine code; a missing barrier or fence (threads run in lock-step);
TMA, mbarrier and tcgen05, which are compiled but not executed; the rounding inside a tensor core; the driver.
"""  # noqa: E501
