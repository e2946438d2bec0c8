"""The command line: parse, call, render. `app` puts it together, a file for each command, `errors` ends them all."""
