"""Findings, one module each (see `regard.study.finding`); `regard.catalog.findings` names them."""
