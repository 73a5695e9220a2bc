"""An HTML page as its readers see it: well-formed, with nothing that runs or is fetched."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """The headings, tables and texts of a page, its pictures, and every address in it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.addresses, self.open = [], [], [], []
        self.headings, self.rows, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        assert not any(name.startswith("on") for name in attributes)
        self.addresses += [attributes[k] for k in ("src", "href", "srcset", "action", "data") if k in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            assert "url(" not in data
            assert "@import" not in data
            return
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if any(tag in ("td", "th") for tag in self.open):
            self.rows[-1][-1] += data

    def row(self, *first):
        return next(r for r in self.rows if r[: len(first)] == list(first))
