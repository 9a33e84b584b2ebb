"""Runs what Triton's compiler makes of a kernel, its PTX for sm_80 or sm_90, on a CPU, with the checks of a sanitizer. For tests alone.

| module | what it is |
|---|---|
| `parse` | PTX text -> a `Program`: blocks of instructions |
| `arithmetic` | instructions that compute a value: as Python expressions |
| `translate` | a `Program` -> Python functions, one a basic block |
| `values` | what those functions call: arithmetic on arrays over threads |
| `threads` | which threads run at once, and which of them are active |
| `memory` | global memory: the memory of the tensors that a launch is given |
| `shared` | shared memory, its shadow, and the copies that are on their way to it |
| `matrix` | ldmatrix, stmatrix, mma.sync |
| `wgmma` | sm_90's products of warp groups |
| `machine` | registers, barriers, shuffles, branches: programs of a launch from beginning to end |
| `report` | what was wrong, and what was counted |
| `launches` | Triton's launches on CPU tensors: compiled as a launch would, and run |

docs/executed.md says what is checked, what is not, and what was found.
"""
