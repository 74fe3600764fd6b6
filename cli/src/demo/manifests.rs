//! The manifests of the demo: what a user of Kubernetes would write for these services, with the
//! ports that on one machine cannot be the same for every pod.

use std::fmt::Write as _;

use std::io;
use std::path::Path;

use super::plan::{NAMESPACE, Plan, Workload};

/// The services as one file of several documents.
pub(crate) fn services(plan: &Plan) -> String {
    let mut text = format!(
        "{MARK}\n\
         # The services. Change it while the demo runs and watch the mesh follow; what is to stay goes into\n\
         # another file of this directory.\n",
    );
    for workload in &plan.workloads {
        service(&mut text, workload);
    }
    text
}

/// The control plane's own workloads, as `trust init` writes them, with the admin ports in use.
pub(crate) fn control_plane(plan: &Plan) -> String {
    let admin_ports = [plan.identity_admin, plan.control_admin, plan.rotation_admin];
    let text = crate::commands::trust::init::control_plane(admin_ports.map(|admin| admin.port()));
    format!("{MARK}\n{text}")
}

/// Whether a file is somebody's own work, which is never written over: it is there, and no earlier
/// demo wrote it.
///
/// # Errors
/// It cannot be read.
pub(crate) fn is_foreign(path: &Path) -> io::Result<bool> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.lines().next() != Some(MARK)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn service(text: &mut String, workload: &Workload) {
    let Workload { name, application, inbound, admin, .. } = workload;
    let (pod, ip) = (workload.pod(), application.ip());
    let (port, inbound, admin) = (application.port(), inbound.port(), admin.port());
    // Writing to a String cannot fail.
    let _ = write!(
        text,
        "---\n\
         apiVersion: v1\n\
         kind: ServiceAccount\n\
         metadata: {{name: {name}, namespace: {NAMESPACE}}}\n\
         ---\n\
         apiVersion: v1\n\
         kind: Pod\n\
         metadata:\n\
         \x20 name: {pod}\n\
         \x20 namespace: {NAMESPACE}\n\
         \x20 labels: {{app: {name}}}\n\
         \x20 annotations:\n\
         \x20   linkerd.io/inject: enabled\n\
         \x20   config.linkerd.io/inbound-port: \"{inbound}\"\n\
         \x20   config.linkerd.io/admin-port: \"{admin}\"\n\
         spec:\n\
         \x20 serviceAccountName: {name}\n\
         \x20 containers:\n\
         \x20 - name: app\n\
         \x20   image: steadfast-demo\n\
         \x20   ports: [{{containerPort: {port}}}]\n\
         status: {{podIP: {ip}, podIPs: [{{ip: {ip}}}]}}\n\
         ---\n\
         apiVersion: v1\n\
         kind: Service\n\
         metadata: {{name: {name}, namespace: {NAMESPACE}}}\n\
         spec:\n\
         \x20 selector: {{app: {name}}}\n\
         \x20 ports: [{{name: http, port: 80, targetPort: {port}}}]\n"
    );
}

/// The first line of what the demo has written.
const MARK: &str = "# Of `steadfast demo`, which writes this file anew at each of its starts.";

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_service_has_an_account_a_pod_and_a_service_under_its_own_ports() {
        let domain = "cluster.local".parse().unwrap();
        let plan = Plan::new(&domain, Duration::from_secs(30), 0).unwrap();
        let text = services(&plan);
        assert_eq!(text.matches("\nkind: ").count(), 9);
        for w in &plan.workloads {
            assert!(text.contains(&format!("inbound-port: \"{}\"", w.inbound.port())));
            assert!(text.contains(&format!("targetPort: {}}}", w.application.port())));
        }
        // YAML knows no tabs, and an indentation that slipped would change the meaning.
        assert!(!text.contains('\t'));
        assert!(text.contains("\n  annotations:\n    linkerd.io/inject: enabled\n"));
        let control = control_plane(&plan);
        assert!(control.contains(&format!("admin-port: \"{}\"", plan.control_admin.port())));
    }
}
