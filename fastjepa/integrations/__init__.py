"""Callbacks for other training frameworks, each imported only by who names it: `.lightning`, `.transformers`."""
