"""Who captions, writes and embeds; chosen by name in the configuration."""
