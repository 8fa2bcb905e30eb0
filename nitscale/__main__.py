"""`python -m nitscale`, as torchrun needs it: `torchrun --nproc-per-node 8 -m nitscale train CONFIG`."""

from nitscale.cli import main

main()
