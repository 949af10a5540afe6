"""Prompts: files, rendering, tokenizers, a resumable cursor."""
