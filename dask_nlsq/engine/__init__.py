"""One read of all data: here, on workers, or unread in a store; merged, and kept in checkpoints."""
