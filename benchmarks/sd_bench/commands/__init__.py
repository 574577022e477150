"""One command of ``sd-bench`` a file, imported when it is called."""
