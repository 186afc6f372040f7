"""The typed config: its schema, reading it from YAML with `key=value` overrides, and the errors that explain what is wrong."""
