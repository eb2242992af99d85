"""The site's additions to MkDocs: formulas, tables of data, and links that leave the pages."""
