import sys; sys.path.insert(0, '.')
from tools.pretrain import *
import time
K,peak=int(sys.argv[1]),float(sys.argv[2]); out=Path('runs/ft'); out.mkdir(exist_ok=True)
sd=StableDiffusion.load('tiny'); sd.to(memory_format=torch.channels_last).requires_grad_(False)
sd.unet.requires_grad_(True)
lat,meta=read_tensors(Path('runs/pretrain/latents.safetensors')); moments,captions=lat['moments'],json.loads(meta['captions'])
ids,empty,sch=sd.tokenizer(captions),sd.tokenizer([""])[0],NoiseSchedule()
w=(1/sch.alphas_cumprod-1).float().clamp(0.3,4)
opt=torch.optim.AdamW(sd.unet.parameters(),betas=(0.9,0.99),weight_decay=0.0,fused=True)
avg=AveragedModel(sd.unet,avg_fn=running_average)
def val(u):
    mo,c=torch.load('/tmp/d/val.pt'); g=torch.Generator().manual_seed(5); o=[]
    z=sd.latent_scale*sample_latent(mo,torch.randn(mo[:,:4].shape,generator=g))
    with torch.no_grad():
        ctx=sd.encode_prompts(c)
        for t in (20,100,200,300,400,500,600,700,800,900):
            eps=torch.randn(z.shape,generator=g); tt=torch.full((len(z),),t)
            p=torch.cat([u(sch.add_noise(z[i:i+64],eps[i:i+64],tt[i:i+64]),tt[i:i+64],ctx[i:i+64]) for i in range(0,192,64)])
            o.append(round((p-eps).square().mean().item()*1e4))
    print(*o,flush=True)
began=time.monotonic(); run=[]
for k in range(K):
    r=min(1,(k+1)/100)*(1-k/K)
    g=torch.Generator().manual_seed(100000+k)
    ch=torch.randint(len(moments),(64,),generator=g); pr=ids[ch]; pr[torch.rand(64,generator=g)<.1]=empty
    noise,eps=(torch.randn(64,*moments[0,:4].shape,generator=g) for _ in range(2))
    z0=sd.latent_scale*sample_latent(moments[ch],noise).contiguous(memory_format=torch.channels_last)
    t=((torch.arange(64)+torch.rand(64,generator=g))*1000/64).long()
    with torch.no_grad(): ctx=sd.text_encoder(pr)
    e=(sd.unet(sch.add_noise(z0,eps,t),t,ctx)-eps).square().mean((1,2,3))
    loss=(w[t]*e).mean(); opt.param_groups[0]['lr']=r*peak
    opt.zero_grad(); loss.backward(); nn.utils.clip_grad_norm_(sd.unet.parameters(),1.0); opt.step(); avg.update_parameters(sd.unet); run.append(e.mean().item())
    if (k+1)%50==0: print(k+1,round(sum(run)/len(run),5),round(time.monotonic()-began),flush=True); run=[]
    if (k+1)%400==0 or k+1==K: save_tensors({n:v.clone() for n,v in avg.module.state_dict().items()},out/'unet.safetensors',{"step":str(k+1)}); val(avg.module)
