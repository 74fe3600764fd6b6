//! Where in a document a field is: asked only when something has to be said about it.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_saphyr::Spanned;

/// The way from the root of a document to a field.
pub(super) type Path = Vec<Step>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Index(usize),
    Key(String),
}

/// Line and column, from 1, of a field, or of the nearest thing around it that is there.
pub(super) fn locate(document: &str, path: &Path) -> (u64, u64) {
    let options = serde_saphyr::options! { with_snippet: false };
    let Ok(root) = serde_saphyr::from_str_with_options::<Spanned<Node>>(document, options) else {
        return (1, 1);
    };
    let mut at = (root.referenced.line().max(1), root.referenced.column().max(1));
    let mut node = &root.value;
    for step in path {
        let found = match (step, node) {
            (Step::Key(key), Node::Map(fields)) => {
                let field = fields.iter().find(|(name, _)| name.value == *key);
                field.map(|(name, value)| (name.referenced, &value.value))
            }
            (Step::Index(index), Node::Sequence(items)) => {
                items.get(*index).map(|item| (item.referenced, &item.value))
            }
            _ => None,
        };
        let Some((location, next)) = found else { break };
        at = (location.line().max(1), location.column().max(1));
        node = next;
    }
    at
}

/// The line, from 1, of each item of a document's `items`.
pub(super) fn lines_of_items(document: &str) -> Vec<u64> {
    let options = serde_saphyr::options! { with_snippet: false };
    let root = serde_saphyr::from_str_with_options::<Spanned<Node>>(document, options);
    let Ok(Spanned { value: Node::Map(fields), .. }) = root else { return Vec::new() };
    let items = fields.into_iter().find(|(name, _)| name.value == "items");
    match items.map(|(_, items)| items.value) {
        Some(Node::Sequence(items)) => {
            items.iter().map(|item| item.referenced.line().max(1)).collect()
        }
        _ => Vec::new(),
    }
}

/// The field whose value begins at this line and column.
pub(super) fn path_at(document: &str, at: (u64, u64)) -> Option<Path> {
    fn find(node: &Spanned<Node>, at: (u64, u64), path: &mut Path) -> bool {
        let here = (node.referenced.line(), node.referenced.column()) == at;
        // The innermost that begins there: a mapping begins where its first key does.
        let inner = match &node.value {
            Node::Map(fields) => fields.iter().any(|(name, value)| {
                path.push(Step::Key(name.value.clone()));
                find(value, at, path) || path.pop().is_none()
            }),
            Node::Scalar => false,
            Node::Sequence(items) => items.iter().enumerate().any(|(index, value)| {
                path.push(Step::Index(index));
                find(value, at, path) || path.pop().is_none()
            }),
        };
        inner || (here && !path.is_empty())
    }
    let options = serde_saphyr::options! { with_snippet: false };
    let root = serde_saphyr::from_str_with_options::<Spanned<Node>>(document, options).ok()?;
    let mut path = Path::new();
    find(&root, at, &mut path).then_some(path)
}

/// `spec.ports[0].port`.
pub(super) fn display(path: &Path) -> String {
    let mut text = String::new();
    for step in path {
        match step {
            Step::Index(index) => text += &format!("[{index}]"),
            Step::Key(key) if text.is_empty() => text += key,
            Step::Key(key) => text += &format!(".{key}"),
        }
    }
    text
}

/// The field at a path.
pub(super) fn get<'a>(value: &'a Value, path: &Path) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, step| match step {
        Step::Index(index) => value.get(index),
        Step::Key(key) => value.get(key),
    })
}

/// Every field that is in `raw` and not in `typed`.
pub(super) fn missing(raw: &Value, typed: &Value, path: &mut Path, found: &mut Vec<Path>) {
    match (raw, typed) {
        (Value::Object(raw), Value::Object(typed)) => {
            for (key, value) in raw {
                path.push(Step::Key(key.clone()));
                match typed.get(key) {
                    Some(typed) => missing(value, typed, path, found),
                    // What is empty may be left out by the type.
                    None if is_empty(value) => {}
                    None => found.push(path.clone()),
                }
                path.pop();
            }
        }
        (Value::Array(raw), Value::Array(typed)) => {
            for (index, (raw, typed)) in raw.iter().zip(typed).enumerate() {
                path.push(Step::Index(index));
                missing(raw, typed, path, found);
                path.pop();
            }
        }
        _ => {}
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

/// The shape of a document with its places.
enum Node {
    Map(Vec<(Spanned<String>, Spanned<Self>)>),
    Scalar,
    Sequence(Vec<Spanned<Self>>),
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut fields = Vec::new();
        while let Some(field) = map.next_entry()? {
            fields.push(field);
        }
        Ok(Node::Map(fields))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Node::Sequence(items))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_str<E>(self, _: &str) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar)
    }
}
