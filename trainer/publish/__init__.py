"""What is handed on: exports, model cards, and files for other tools."""
