"""The documents are tried: links, code blocks, generated references, the drawn states, the quickstart, the site."""
