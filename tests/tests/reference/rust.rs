//! Reads what the documents need of the structs and enums at the top level of Rust sources: names, types,
//! attributes and doc comments of their fields.

/// A struct or an enum at the top level of a file.
#[derive(Debug, Clone, Default)]
pub(crate) struct Item {
    pub(crate) name: String,
    pub(crate) is_enum: bool,
    /// Attributes of the item, as they are written.
    pub(crate) attributes: String,
    /// Fields of a struct, or variants of an enum without fields.
    pub(crate) fields: Vec<Field>,
}

/// A field of a struct, or a variant of an enum.
#[derive(Debug, Clone, Default)]
pub(crate) struct Field {
    pub(crate) name: String,
    /// Type of a field; empty for a variant.
    pub(crate) kind: String,
    /// Doc comment in one line, without links.
    pub(crate) doc: String,
    pub(crate) attributes: String,
}

impl Field {
    /// Returns the name of the field in the data, which `serde` may rename.
    pub(crate) fn key(&self) -> String {
        let renamed = self.attributes.split_once("rename = \"").map(|(_, rest)| rest);
        let renamed = renamed.and_then(|rest| rest.split_once('"')).map(|(name, _)| name);
        renamed.unwrap_or(&self.name).to_owned()
    }

    /// Returns the name of a variant in kebab case, as `serde` writes it.
    pub(crate) fn kebab(&self) -> String {
        let mut kebab = String::new();
        for c in self.name.chars() {
            if c.is_uppercase() && !kebab.is_empty() {
                kebab.push('-');
            }
            kebab.extend(c.to_lowercase());
        }
        kebab
    }
}

/// Doc comment and attributes in front of an item or a field.
#[derive(Default)]
struct Before {
    doc: Vec<String>,
    attributes: String,
    /// True inside of an attribute of several lines.
    is_open: bool,
}

impl Before {
    /// Takes a line that belongs to the next item. Returns false if the line is something else.
    fn take(&mut self, line: &str) -> bool {
        if self.is_open || line.starts_with("#[") {
            self.attributes += line;
            let count = |c: char| self.attributes.matches(c).count();
            self.is_open = count('[') > count(']');
            return true;
        }
        if let Some(text) = line.strip_prefix("///") {
            self.doc.push(text.trim().to_owned());
            return true;
        }
        line.is_empty() || line.starts_with("//")
    }

    /// Returns the doc comment in one line, with code instead of links to code.
    fn doc(&self) -> String {
        self.doc.join(" ").trim().replace("[`", "`").replace("`]", "`")
    }
}

/// Returns the structs with named fields and the enums at the top level of a source file.
pub(crate) fn items(source: &str) -> Vec<Item> {
    let mut found = Vec::new();
    let mut before = Before::default();
    let mut lines = source.lines();
    while let Some(line) = lines.next() {
        if line.starts_with(' ') && !before.is_open {
            continue;
        }
        if before.take(line.trim()) {
            continue;
        }
        let declared = line.trim_start_matches("pub(crate) ").trim_start_matches("pub(super) ");
        let declared = declared.trim_start_matches("pub ");
        let is_enum = declared.starts_with("enum ");
        let declared = declared.strip_prefix("struct ").or(declared.strip_prefix("enum "));
        if let Some(declared) = declared.filter(|text| text.ends_with('{')) {
            let end = declared.find(|c: char| !c.is_alphanumeric()).unwrap_or(declared.len());
            let body = lines.by_ref().take_while(|line| *line != "}");
            found.push(Item {
                name: declared[..end].to_owned(),
                is_enum,
                attributes: std::mem::take(&mut before).attributes,
                fields: fields(body, is_enum),
            });
        }
        before = Before::default();
    }
    found
}

fn fields<'a>(body: impl Iterator<Item = &'a str>, is_enum: bool) -> Vec<Field> {
    let mut found = Vec::new();
    let mut before = Before::default();
    for line in body.map(str::trim) {
        if before.take(line) {
            continue;
        }
        let text = line.trim_end_matches(',');
        let text = text.trim_start_matches("pub(super) ").trim_start_matches("pub ");
        let (name, kind) =
            if is_enum { (text, "") } else { text.split_once(": ").unwrap_or(("", "")) };
        if !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '_') {
            let (doc, attributes) = (before.doc(), std::mem::take(&mut before.attributes));
            found.push(Field { name: name.to_owned(), kind: kind.to_owned(), doc, attributes });
        }
        before = Before::default();
    }
    found
}

/// Returns the item of this name in a file of the workspace.
pub(crate) fn item(file: &str, name: &str) -> Item {
    let found = items(&super::read(file)).into_iter().find(|item| item.name == name);
    found.unwrap_or_else(|| panic!("no {name} in {file}"))
}

/// Returns the type inside of a generic one, for example of `Option<T>`.
pub(crate) fn inner<'a>(kind: &'a str, outer: &str) -> Option<&'a str> {
    kind.strip_prefix(outer)?.strip_prefix('<')?.strip_suffix('>')
}

#[test]
fn fields_have_their_docs_types_and_names() {
    let source = "/// A.\n#[derive(X)]\npub struct A<'a> {\n    /// Field\n    /// of [`B`].\n    \
                  #[serde(rename = \"other\")]\n    pub one: Option<u8>,\n    two: Vec<B>,\n}\n\nimpl A \
                  {\n    fn f() {}\n}\n\n#[serde(x)]\npub enum B {\n    /// First.\n    NodeIp,\n}\n";
    let items = items(source);
    assert_eq!(items.len(), 2);
    let (a, b) = (&items[0], &items[1]);
    assert_eq!((a.name.as_str(), a.is_enum, a.attributes.as_str()), ("A", false, "#[derive(X)]"));
    assert_eq!((a.fields[0].key(), a.fields[0].doc.as_str()), ("other".into(), "Field of `B`."));
    assert_eq!(inner(&a.fields[0].kind, "Option"), Some("u8"));
    assert_eq!((a.fields[1].key(), a.fields[1].doc.as_str()), ("two".into(), ""));
    assert!(b.is_enum && b.attributes.contains("serde(x)"));
    assert_eq!(b.fields[0].kebab(), "node-ip");
}
