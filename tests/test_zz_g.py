import time, collections
def test_g(tiny_llama, request):
    t=time.time(); g=request.getfixturevalue("guesser"); print("took", time.time()-t)
    import torch
    from transformers import AutoModelForCausalLM
    from pipeline.chat import load_chat
    from pipeline.tasks import instruct
    m=AutoModelForCausalLM.from_pretrained(g); c=load_chat(g)
    for shots in ([], [(instruct("Tom has 5 pens. How many pens?","number"), "He starts with 5 pens and buys 3. The answer is \\boxed{8}.")]):
        ids=c.prompt_ids(instruct("Tom has 17 pens. How many pens?","number"), shots); print(len(ids))
        out=m.generate(torch.tensor([ids]*64),do_sample=True,temperature=0.8,top_k=0,max_new_tokens=40)
        n=collections.Counter()
        for o in out:
            t=c.tokenizer.decode(o[len(ids):]); n[t[t.find('boxed'):]]+=1
        print(n.most_common(8)); print(t)
