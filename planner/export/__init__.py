"""A predicted step in other tools' formats: a module a format, and what each cannot say."""
