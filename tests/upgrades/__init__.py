"""Earlier releases, kept in releases/, and what becomes of their databases, workers and clients."""
