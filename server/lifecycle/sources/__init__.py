"""Where adapters come from: a source string → an adapter's folder, open for reading. `sources.Sources` is the door."""
