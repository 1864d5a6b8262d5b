"""What is drawn: Plotly figures of a step and of sweeps, the timeline's arrays, the HTML page;
``static`` has the page's own files, which the web page and comparisons share.
"""
