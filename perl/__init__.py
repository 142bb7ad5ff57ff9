"""perl: reinforcement learning from preferences with LoRA (SFT, reward model, REINFORCE).

`python -m perl --help` lists the commands. The kernels live in `perl_kernels`, which is useful
without this package; this package uses only its public names.
"""
