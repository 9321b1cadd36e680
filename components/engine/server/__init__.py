"""The server: an export behind OpenAI's HTTP interface, on the torch engine."""
