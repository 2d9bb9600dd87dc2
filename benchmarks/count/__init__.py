"""What the GPU kernels execute, counted from their machine code without a GPU: `make count`, docs/gpu.md.

``launches`` and ``inductor`` record what a call launches, ``code`` and ``sass`` hold machine code, ``machine`` runs it
with ``opcodes``, ``counting`` counts a launch, ``rows`` a benchmark's row, ``estimate`` says how long it takes,
``choice`` which backend is faster, and ``page`` writes it all down.
"""
