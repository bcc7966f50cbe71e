//! `pull`: a model of Hugging Face into its cache; the path of the (first) file on stdout.

use anyhow::{Context as _, Result, bail};

use crate::args::PullArgs;
use crate::hub::fetch::Hub;
use crate::hub::{Cache, Spec, choose};
use crate::ui;

/// `pull`.
pub fn run(args: &PullArgs) -> Result<()> {
    let spec = Spec::parse(&args.model)?;
    let cache = Cache::from_env();
    let set = |name| {
        std::env::var(name)
            .is_ok_and(|v| !matches!(v.to_ascii_lowercase().as_str(), "" | "0" | "false" | "no" | "off"))
    };
    let (quant, file) = (spec.quant.as_deref(), args.hf_file.as_deref());
    if args.offline || set("HF_HUB_OFFLINE") {
        let cached = cache.snapshot(&spec.repo)?;
        let Some((folder, names)) = cached else {
            bail!("{}: not in the cache, and this is offline", spec.repo)
        };
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let (chosen, _) =
            choose(&names, quant, file).with_context(|| format!("{} (in the cache, offline)", spec.repo))?;
        return ui::out(format!("{}\n", folder.join(chosen[0]).display()));
    }
    let hub = Hub::from_env()?;
    let repository = hub.repository(&spec.repo)?;
    let names: Vec<&str> = repository.siblings.iter().map(|f| f.rfilename.as_str()).collect();
    let (chosen, as_asked) = choose(&names, quant, file).with_context(|| spec.repo.clone())?;
    if !as_asked {
        ui::say(format!("{}: no file of the usual quantisation; taking {}", spec.repo, chosen[0]));
    }
    let mut paths = Vec::new();
    for name in chosen {
        let remote =
            repository.siblings.iter().find(|f| f.rfilename == name).context("a name of the list")?;
        paths.push(hub.fetch(&cache, &spec.repo, &repository.sha, remote)?);
    }
    ui::out(format!("{}\n", paths[0].display()))
}
