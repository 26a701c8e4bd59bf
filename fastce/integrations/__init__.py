"""fastce in other people's trainers: one module a library, at that library's own convention, imported on demand."""
