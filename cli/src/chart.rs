//! Our charts, within the program: what Helm renders from `manifests/charts`, rendered here, so that
//! nobody needs Helm. Pure: values in, manifests out.

use std::sync::{Arc, OnceLock, Weak};

use gotmpl::{MissingKey, Template, TemplateError};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::suggest::nearest;

/// A chart.
#[derive(Debug)]
pub(crate) struct Chart {
    /// Its name.
    pub(crate) name: &'static str,
    /// Its templates, by the names of their files.
    templates: &'static [(&'static str, &'static str)],
    /// Its values, as they are when nobody says otherwise.
    values: &'static str,
}

/// Why nothing is rendered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChartError {
    #[error("{name}: {found} cannot be used: the chart has {usual} there")]
    Kind { name: String, found: String, usual: String },
    #[error("the values cannot be read: {0}")]
    Parse(String),
    #[error("--set {0:?}: expected NAME=VALUE, such as identity.replicas=3")]
    Set(String),
    #[error("the chart {chart} cannot be rendered: {file}")]
    Template {
        chart: &'static str,
        file: &'static str,
        #[source]
        error: Box<TemplateError>,
    },
    #[error("the chart has no value {name:?}{hint}")]
    Unknown { name: String, hint: String },
}

macro_rules! templates {
    ($chart:literal: $($file:literal),* $(,)?) => {
        &[$(($file, include_str!(concat!(
            "../../manifests/charts/", $chart, "/templates/", $file
        )))),*]
    };
}

/// The CustomResourceDefinitions.
pub(crate) static CRDS: Chart = Chart {
    name: "steadfast-crds",
    templates: templates!(
        "steadfast-crds": "externalworkload.yaml", "server.yaml", "trustdomain.yaml",
    ),
    values: "{}",
};

/// The control plane.
pub(crate) static MESH: Chart = Chart {
    name: "steadfast",
    templates: templates!("steadfast":
        "_pod.tpl", "namespace.yaml", "identity.yaml", "rotation.yaml", "control.yaml",
        "injector.yaml", "network.yaml", "values.yaml",
    ),
    values: include_str!("../../manifests/charts/steadfast/values.yaml"),
};

/// The values for several nodes.
pub(crate) const HIGHLY_AVAILABLE: &str =
    include_str!("../../manifests/charts/steadfast/values-ha.yaml");

impl Chart {
    /// Its values, as they are when nobody says otherwise.
    ///
    /// # Errors
    /// They do not parse, which a test rules out.
    pub(crate) fn usual(&self) -> Result<Value, ChartError> {
        parse(self.values)
    }

    /// What every meshed pod has in common, as the webhook and `steadfast inject` read it.
    ///
    /// # Errors
    /// [`ChartError::Template`]
    pub(crate) fn injection(&self, values: &Value, namespace: &str) -> Result<String, ChartError> {
        let (whole, data) = (self.parsed()?, data(self.name, values, namespace));
        let template = whole.get().map(|template| {
            template.execute_template_to_string("steadfast.injection", &to_template(&data))
        });
        let file = "_pod.tpl";
        template.unwrap_or_else(|| Ok(String::new())).map_err(|error| ChartError::Template {
            chart: self.name,
            file,
            error: Box::new(error),
        })
    }

    /// The manifests, one document after the other, with these values whole.
    ///
    /// # Errors
    /// [`ChartError::Template`]
    pub(crate) fn render(&self, values: &Value, namespace: &str) -> Result<String, ChartError> {
        let (whole, data) = (self.parsed()?, data(self.name, values, namespace));
        let mut manifests = String::new();
        for (file, _) in self.templates.iter().filter(|(file, _)| !file.starts_with('_')) {
            let rendered = whole.get().map(|whole| {
                whole.execute_template_to_string(file, &to_template(&data)).map_err(|error| {
                    ChartError::Template { chart: self.name, file, error: Box::new(error) }
                })
            });
            manifests.push_str("---\n");
            manifests.push_str(rendered.transpose()?.unwrap_or_default().trim());
            manifests.push('\n');
        }
        Ok(manifests)
    }

    /// All of its templates, which find each other.
    fn parsed(&self) -> Result<Arc<OnceLock<Template>>, ChartError> {
        let cell = Arc::new(OnceLock::new());
        let mut template = functions(Template::new(self.name), Arc::downgrade(&cell))
            .missing_key(MissingKey::Error);
        let failed = |file| {
            move |error| ChartError::Template { chart: self.name, file, error: Box::new(error) }
        };
        for (file, text) in self.templates {
            // Each by its name, to be executed by it.
            let named = if file.starts_with('_') {
                (*text).to_owned()
            } else {
                format!("{{{{define {file:?}}}}}{text}{{{{end}}}}")
            };
            template = template.parse(&named).map_err(failed(file))?;
        }
        cell.get_or_init(|| template);
        Ok(cell)
    }
}

/// What templates are given.
fn data(chart: &str, values: &Value, namespace: &str) -> Value {
    let version = env!("CARGO_PKG_VERSION");
    json!({
        "Values": values,
        "Chart": { "Name": chart, "Version": version, "AppVersion": version },
        "Release": { "Name": chart, "Namespace": namespace, "Service": "steadfast" },
    })
}

/// Puts values in the place of others.
///
/// # Errors
/// A value that the chart does not have, or has of another kind.
pub(crate) fn merge(into: &mut Value, over: Value) -> Result<(), ChartError> {
    merge_at(into, over, "")
}

/// Parses values of a file.
///
/// # Errors
/// It is no YAML.
pub(crate) fn parse(text: &str) -> Result<Value, ChartError> {
    let value: Value =
        serde_saphyr::from_str(text).map_err(|error| ChartError::Parse(error.to_string()))?;
    Ok(if value.is_null() { json!({}) } else { value })
}

/// The value that `NAME=VALUE` sets.
///
/// # Errors
/// It is none.
pub(crate) fn set(text: &str) -> Result<Value, ChartError> {
    let wrong = || ChartError::Set(text.to_owned());
    let (name, value) = text.split_once('=').ok_or_else(wrong)?;
    if name.is_empty() || name.split('.').any(str::is_empty) {
        return Err(wrong());
    }
    Ok(name.rsplit('.').fold(json!(value), |inner, part| json!({ part: inner })))
}

fn merge_at(into: &mut Value, over: Value, at: &str) -> Result<(), ChartError> {
    let (Value::Object(known), Value::Object(over)) = (&mut *into, &over) else {
        return replace(into, over, at);
    };
    for (name, value) in over {
        let path = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
        if value.is_null() && known.contains_key(name) {
            continue;
        }
        match known.get_mut(name) {
            Some(inner) => merge_at(inner, value.clone(), &path)?,
            // What Kubernetes knows of is its own affair.
            None if FREE.iter().any(|free| path.starts_with(free)) => {
                known.insert(name.clone(), value.clone());
            }
            None => {
                let near = nearest(name, known.keys().map(String::as_str));
                let hint = near.first().map(|near| format!("; did you mean {near:?}?"));
                let hint = hint.unwrap_or_default();
                return Err(ChartError::Unknown { name: path, hint });
            }
        }
    }
    Ok(())
}

fn replace(into: &mut Value, over: Value, at: &str) -> Result<(), ChartError> {
    let kind = |value: &Value| match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a map",
    };
    let over = match (&*into, over) {
        // As a flag has it.
        (Value::Number(_) | Value::Bool(_) | Value::Array(_), Value::String(text)) => {
            serde_saphyr::from_str(&text).unwrap_or(Value::String(text))
        }
        // As Helm keeps a tag that looks like one.
        (Value::String(_), Value::Number(number)) => json!(number.to_string()),
        (_, over) => over,
    };
    if kind(into) != kind(&over) {
        let (found, usual) = (format!("{} ({over})", kind(&over)), kind(into).to_owned());
        return Err(ChartError::Kind { name: at.to_owned(), found, usual });
    }
    *into = over;
    Ok(())
}

/// The functions of Helm that our charts use.
fn functions(template: Template, whole: Weak<OnceLock<Template>>) -> Template {
    use gotmpl::Value as V;
    let text = |value: Option<&V>| value.map(ToString::to_string).unwrap_or_default();
    let wrong = |why: String| TemplateError::Exec(why);
    let indented = move |args: &[V]| {
        let width = args.first().and_then(V::as_int).unwrap_or_default();
        let spaces = " ".repeat(usize::try_from(width).unwrap_or_default());
        text(args.get(1)).lines().map(|line| format!("\n{spaces}{line}")).collect::<String>()
    };
    template
        .func("include", move |args| {
            let whole = whole.upgrade();
            let whole = whole.as_ref().and_then(|whole| whole.get());
            let whole = whole.ok_or_else(|| wrong("nothing is parsed yet".to_owned()))?;
            let data = args.get(1).unwrap_or(&V::Nil);
            Ok(V::String(whole.execute_template_to_string(&text(args.first()), data)?.into()))
        })
        .func("nindent", move |args| Ok(V::String(indented(args).into())))
        .func("toYaml", move |args| {
            let value = from_template(args.first().unwrap_or(&V::Nil));
            let yaml = serde_saphyr::to_string(&value).map_err(|error| wrong(error.to_string()))?;
            Ok(V::String(yaml.trim_end().into()))
        })
        .func("toPrettyJson", move |args| {
            let value = from_template(args.first().unwrap_or(&V::Nil));
            let json = serde_json::to_string_pretty(&value);
            Ok(V::String(json.map_err(|error| wrong(error.to_string()))?.into()))
        })
        .func("default", |args| {
            let given = args.get(1).filter(|given| given.is_truthy());
            Ok(given.or_else(|| args.first()).cloned().unwrap_or(V::Nil))
        })
        .func("quote", move |args| Ok(V::String(json!(text(args.first())).to_string().into())))
        .func("sha256sum", move |args| {
            Ok(V::String(hex::encode(Sha256::digest(text(args.first()))).into()))
        })
        .func("int", |args| Ok(V::Int(args.first().and_then(V::as_int).unwrap_or_default())))
        .func("list", |args| Ok(V::List(args.to_vec().into())))
        .func("fail", move |args| Err(wrong(text(args.first()))))
        .func("dict", move |args| {
            let pairs = args.chunks(2).map(|pair| (text(pair.first()).into(), pair[1..].to_vec()));
            let map = pairs.map(|(name, rest)| (name, rest.into_iter().next().unwrap_or(V::Nil)));
            Ok(V::Map(Arc::new(map.collect())))
        })
}

fn to_template(value: &Value) -> gotmpl::Value {
    use gotmpl::Value as V;
    match value {
        Value::Null => V::Nil,
        Value::Bool(value) => V::Bool(*value),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(whole), _) => V::Int(whole),
            (None, broken) => V::Float(broken.unwrap_or_default()),
        },
        Value::String(text) => V::String(text.as_str().into()),
        Value::Array(list) => V::List(list.iter().map(to_template).collect()),
        Value::Object(map) => V::Map(Arc::new(
            map.iter().map(|(name, value)| (name.as_str().into(), to_template(value))).collect(),
        )),
    }
}

fn from_template(value: &gotmpl::Value) -> Value {
    use gotmpl::Value as V;
    match value {
        V::Bool(value) => json!(value),
        V::Int(number) => json!(number),
        V::Uint(number) => json!(number),
        V::Float(number) => json!(number),
        V::String(text) => json!(&**text),
        V::List(list) => list.iter().map(from_template).collect(),
        V::Map(map) => {
            let all = map.iter().map(|(name, value)| (name.to_string(), from_template(value)));
            Value::Object(all.collect::<Map<_, _>>())
        }
        _ => Value::Null,
    }
}

/// Values whose content is Kubernetes'.
const FREE: [&str; 5] = [
    "nodeSelector.",
    "identity.resources.",
    "rotation.resources.",
    "control.resources.",
    "proxy.resources.",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(rendered: &str) -> Vec<Value> {
        rendered
            .split("\n---\n")
            .filter(|text| text.lines().any(|line| !line.starts_with('#') && !line.is_empty()))
            .map(|text| serde_saphyr::from_str(text).unwrap_or_else(|e| panic!("{e}\n{text}")))
            .collect()
    }

    #[test]
    fn the_charts_render_the_same_each_time_and_make_no_certificate() {
        let values = MESH.usual().unwrap();
        let rendered = MESH.render(&values, "steadfast").unwrap();
        assert_eq!(rendered, MESH.render(&values, "steadfast").unwrap());
        assert!(!rendered.contains("BEGIN ") && !rendered.contains("kind: Secret"));
        let documents = documents(&rendered);
        let deployments = documents.iter().filter(|one| one["kind"] == "Deployment");
        let names: Vec<_> =
            deployments.map(|one| one["metadata"]["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["steadfast-identity", "steadfast-rotation", "steadfast-control"]);
        for one in documents {
            assert!(one["apiVersion"].is_string() && one["metadata"]["name"].is_string(), "{one}");
        }
        assert!(CRDS.render(&json!({}), "").unwrap().contains("trust.steadfast.dev"));
    }

    #[test]
    fn values_for_several_nodes_are_values_of_the_chart() {
        let mut values = MESH.usual().unwrap();
        merge(&mut values, parse(HIGHLY_AVAILABLE).unwrap()).unwrap();
        let rendered = MESH.render(&values, "steadfast").unwrap();
        assert_eq!(rendered.matches("kind: PodDisruptionBudget").count(), 3);
        assert!(rendered.contains("podAntiAffinity") && rendered.contains("failurePolicy: Fail"));
    }

    #[test]
    fn a_value_is_set_by_its_name_and_a_wrong_one_is_told() {
        let mut values = MESH.usual().unwrap();
        for good in [
            "identity.replicas=3",
            "image.tag=1.10",
            "nodeSelector.disk=ssd",
            "control.resources.limits.cpu=1",
            "priorityClassName=",
        ] {
            merge(&mut values, set(good).unwrap()).unwrap();
        }
        assert_eq!(values["identity"]["replicas"], 3);
        assert_eq!(values["image"]["tag"], "1.10");
        assert_eq!(values["nodeSelector"]["disk"], "ssd");
        let refused =
            |text: &str| merge(&mut values.clone(), set(text).unwrap()).unwrap_err().to_string();
        let error = refused("identity.replica=3");
        assert!(
            error.contains("\"identity.replica\"") && error.contains("\"replicas\""),
            "{error}"
        );
        let error = refused("identity.replicas=many");
        assert!(error.contains("identity.replicas") && error.contains("a number"), "{error}");
        for bad in ["identity", "=3", "a..b=1"] {
            assert!(set(bad).is_err(), "{bad}");
        }
    }
}
