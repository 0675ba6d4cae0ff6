"""Many machines: one agent per MPI rank runs the user's command or starts workers; see docs/distributed.md."""
