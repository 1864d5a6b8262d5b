"""Who does what in which order, without times: actions, tables of rows, every schedule, when
transfers are posted, and the order of an F beside a B.
"""
