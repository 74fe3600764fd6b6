//! What a manifest may be, and what is said about one that may not.

use super::*;

fn object(text: &str) -> Object {
    let (mut objects, warnings) = parse(text.as_bytes()).unwrap();
    assert_eq!((objects.len(), warnings), (1, Vec::new()), "{text}");
    objects.remove(0)
}

fn refused(text: &str) -> (u64, u64, String) {
    match parse(text.as_bytes()) {
        Ok(objects) => panic!("accepted: {objects:?}"),
        Err(error) => (error.line, error.column, error.reason),
    }
}

const SERVICE: &str = "apiVersion: v1
kind: Service
metadata:
  name: web
spec:
  selector: {app: web}
  ports:
  - port: 80
";

#[test]
fn a_service_gets_what_the_api_server_fills_in() {
    let service = object(SERVICE);
    assert_eq!((service.kind.as_str(), service.line), ("Service", 1));
    assert_eq!(service.name, ObjectName::new("default", "web"));
    let port = &service.value["spec"]["ports"][0];
    assert_eq!((&port["targetPort"], &port["protocol"]), (&80.into(), &"TCP".into()));
    assert_eq!(service.value["metadata"]["namespace"], "default");
}

#[test]
fn a_pod_runs_as_the_default_service_account() {
    let pod = object("{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: demo}, spec: {}}");
    assert_eq!(pod.value["spec"]["serviceAccountName"], "default");
    assert_eq!(pod.name, ObjectName::new("demo", "a"));
}

#[test]
fn a_file_holds_any_number_of_documents() {
    let text = format!(
        "# a comment\n---\n# nothing\n---\n{SERVICE}--- # the next\n{}...\n---\n",
        SERVICE.replace("name: web", "name: api")
    );
    let (objects, _) = parse(text.as_bytes()).unwrap();
    let found: Vec<_> = objects.iter().map(|o| (o.name.name.as_str(), o.line)).collect();
    assert_eq!(found, [("web", 5), ("api", 14)]);
    assert_eq!(parse(b"").unwrap().0, Vec::new());
    assert_eq!(parse(b"# only this\n").unwrap().0, Vec::new());
}

#[test]
fn a_list_is_its_items_each_with_its_own_line() {
    let text = "apiVersion: v1
kind: List
metadata: {resourceVersion: ''}
items:
- apiVersion: v1
  kind: Service
  metadata: {name: web, namespace: demo}
  spec:
    ports:
    - port: 80
- apiVersion: v1
  kind: ServiceAccount
  metadata: {name: web, namespace: demo}
";
    let (objects, warnings) = parse(format!("---\n---\n{text}").as_bytes()).unwrap();
    let found: Vec<_> = objects.iter().map(|o| (o.kind.as_str(), o.line)).collect();
    assert_eq!(found, [("Service", 7), ("ServiceAccount", 13)]);
    assert_eq!(warnings, []);
    assert_eq!(objects[0].value["spec"]["ports"][0]["targetPort"], 80);
    // What is wrong in an item is found where it is, or names the item.
    assert_eq!(refused(&text.replace("port: 80", "port: 0")).0, 10);
    assert_eq!(refused(&text.replacen("name: web", "name: ../x", 1)).0, 7);
    let (line, _, reason) = refused(&text.replace("port: 80", "port: eighty"));
    assert!(line == 5 && reason.contains("items[0]"), "{line}: {reason}");
    let (line, _, reason) = refused("apiVersion: v1\nkind: List\nitems: 7\n");
    assert!(line == 3 && reason.contains("a List needs items"), "{line}: {reason}");
    let nested = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: List, items: []}\n";
    assert_eq!(refused(nested).0, 4);
    assert_eq!(parse(b"{apiVersion: v1, kind: List, items: []}").unwrap().0, []);
}

#[test]
fn a_line_of_dashes_inside_a_text_does_not_end_the_document() {
    let text =
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata:\n  x: |\n    ---\n    y\n";
    assert_eq!(object(text).value["data"]["x"], "---\ny\n");
}

#[test]
fn what_is_wrong_is_said_with_line_column_and_reason() {
    let cases: &[(&str, u64, &str)] = &[
        ("a: [1\n", 1, "unclosed bracket"),
        ("apiVersion: v1\nkind: Service\n\tmetadata: {}\n", 2, ""),
        ("just a text\n", 1, "Kubernetes object"),
        ("- a\n", 1, "Kubernetes object"),
        ("kind: Service\n", 1, "apiVersion is missing"),
        ("apiVersion: v1\n", 1, "kind is missing"),
        ("apiVersion: v1\nkind: Service\nmetadata:\n  labels: {}\n", 3, "metadata.name is missing"),
        ("apiVersion: v1\nkind: Service\nmetadata:\n  name: [a]\n", 4, "metadata.name is no text"),
        ("apiVersion: v1\nkind: Service\nmetadata:\n  name: ../x\n", 4, "is no name"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: x}\n", 1, "spec is missing"),
        ("apiVersion: v1\nkind: pod\nmetadata: {name: x}\n", 2, "kind \"pod\" is none"),
        ("apiVersion: a b\nkind: Pod\nmetadata: {name: x}\n", 1, "apiVersion \"a b\" is none"),
        ("apiVersion: v2\nkind: Service\nmetadata: {name: x}\n", 1, "a Service is v1, not v2"),
        (&SERVICE.replace("80", "eighty"), 8, "spec.ports[0].port: invalid i32"),
        (&SERVICE.replace("80", "0"), 8, "spec.ports[0].port is 0 or missing"),
        (&SERVICE.replace("80", "70000"), 8, "from 1 to 65535"),
        (&SERVICE.replace("port: 80", "name: http"), 8, "0 or missing"),
        (&SERVICE.replace("- port: 80", "- port: 80\n  - port: 81"), 8, "needs a name"),
        (&SERVICE.replace("name: web", "name: web\n  name: again"), 5, "duplicate"),
    ];
    let wrong = cases.iter().filter_map(|(text, line, part)| {
        let (found, column, reason) = refused(text);
        let good = found == *line && column >= 1 && reason.contains(part);
        (!good || reason.contains('\n')).then(|| format!("{text}\n  {found}:{column} {reason}"))
    });
    assert_eq!(wrong.collect::<Vec<_>>(), Vec::<String>::new());
}

#[test]
fn a_line_is_counted_from_the_beginning_of_the_file() {
    let text = format!("{SERVICE}---\n{}", SERVICE.replace("80", "eighty"));
    assert_eq!(refused(&text).0, 17);
    let text = format!("{SERVICE}---\n{}", SERVICE.replace("80", "99999"));
    assert_eq!(refused(&text).0, 17);
}

#[test]
fn a_truth_value_is_no_annotation() {
    let text = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: demo\n  annotations:\n    linkerd.io/inject: true\n";
    assert_eq!(refused(text).0, 6);
    let quoted = text.replace("true", "\"true\"");
    let annotation = &object(&quoted).value["metadata"]["annotations"]["linkerd.io/inject"];
    assert_eq!(annotation, "true");
    let enabled = text.replace("true", "enabled");
    assert_eq!(object(&enabled).name, ObjectName::new("", "demo"));
}

#[test]
fn an_unknown_field_is_said_and_left_out() {
    let text = SERVICE.replace("  selector:", "  seelctor: {app: web}\n  selector:");
    let (objects, warnings) = parse(text.as_bytes()).unwrap();
    assert_eq!(warnings.len(), 1);
    assert_eq!(warnings[0].line, 6);
    assert!(warnings[0].text.contains("spec.seelctor"), "{}", warnings[0].text);
    assert!(objects[0].value["spec"].get("seelctor").is_none());
}

#[test]
fn other_kinds_are_kept_as_they_are() {
    let route = object(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web}\nspec: {anything: [1, {b: c}]}\n",
    );
    assert_eq!(route.value["spec"]["anything"][1]["b"], "c");
    assert_eq!(route.name, ObjectName::new("default", "web"));
    let role = object(
        "{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRole, metadata: {name: 'system:x'}}",
    );
    assert_eq!(role.name, ObjectName::new("", "system:x"));
}

#[test]
fn what_a_server_has_set_is_not_taken_from_a_copy() {
    let text = SERVICE.replace(
        "  name: web",
        "  name: web\n  uid: x\n  resourceVersion: '7'\n  creationTimestamp: 2020-01-01T00:00:00Z",
    );
    let metadata = object(&text).value["metadata"].clone();
    assert_eq!(metadata, serde_json::json!({"name": "web", "namespace": "default"}));
}

#[test]
fn an_endpoint_slice_holds_addresses_of_its_family() {
    let text = "apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 8080}]
endpoints:
- addresses: [10.0.0.1]
";
    assert_eq!(object(text).value["ports"][0]["protocol"], "TCP");
    assert_eq!(refused(&text.replace("10.0.0.1", "::1")).0, 7);
    assert_eq!(refused(&text.replace("IPv4", "IPv5")).0, 4);
    assert_eq!(refused(&text.replace("[10.0.0.1]", "[]")).0, 7);
    assert_eq!(refused(&text.replace("8080", "-1")).0, 5);
    let reserved = "{endpointslice.kubernetes.io/managed-by: steadfast-store}";
    let reserved = text.replace("{kubernetes.io/service-name: web}", reserved);
    assert!(refused(&reserved).2.contains("derives itself"));
}

#[test]
fn bytes_that_are_no_text_are_placed() {
    let error = parse(b"a: b\nc: \xff\n").unwrap_err();
    assert_eq!((error.line, error.column), (2, 4));
}

#[test]
fn no_text_of_random_bytes_panics() {
    use rand::{Rng as _, SeedableRng as _};
    let mut rng = rand::rngs::StdRng::seed_from_u64(7);
    let alphabet = b"abk: -\n[]{}#'\"|>&*!%@\\\t0";
    for _ in 0..3000 {
        let length = rng.random_range(0..80);
        let text: Vec<u8> =
            (0..length).map(|_| alphabet[rng.random_range(0..alphabet.len())]).collect();
        let _ = parse(&text);
        // The same in the place of a field.
        let text =
            [b"apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec:\n  ", &text[..]].concat();
        let _ = parse(&text);
    }
}
